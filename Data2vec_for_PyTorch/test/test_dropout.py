"""The CPU dropout: its distribution, its gradients, and that torch's seed governs it."""

import math

import pytest
import torch

from data2vec.cpu_dropout import RandomBits, attention, dropout_add, keep_mask


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_masks_have_the_distribution_of_dropout(p):
    """Rate, and independence of neighbours in a row, in a column and of the same place in two draws: 5 sigma."""
    torch.manual_seed(0)
    bits = RandomBits()
    first, second = (1 - keep_mask(bits.draw((1000, 1001)), p) for _ in range(2))
    count = first.numel()
    assert abs(float(first.mean()) - p) < 5 * math.sqrt(p * (1 - p) / count)
    for a, b in (
        (first[:, 1:], first[:, :-1]),
        (first[1:], first[:-1]),
        (first, second),
        (first[:, 4:], first[:, :-4]),
    ):
        correlation = float(((a - p) * (b - p)).mean()) / (p * (1 - p))
        assert abs(correlation) < 5 / math.sqrt(a.numel())
    counts = first.sum(dim=1)  # binomial rows: also their spread is right
    assert float(counts.var()) == pytest.approx(1001 * p * (1 - p), rel=0.25)


def test_follows_torch_seed():
    def draw(seed):
        torch.manual_seed(seed)
        return dropout_add(torch.ones(50, 50), None, 0.3, True), dropout_add(torch.ones(50, 50), None, 0.3, True)

    (a, b), (c, d), (e, _) = draw(1), draw(1), draw(2)
    assert torch.equal(a, c) and torch.equal(b, d)
    assert not torch.equal(a, b) and not torch.equal(a, e)


def test_dropout_add():
    x, residual = (torch.randn(300, 40, requires_grad=True) for _ in range(2))
    y = dropout_add(x, residual, 0.25, True)
    kept = (y - residual).detach().abs() > 1e-6
    torch.testing.assert_close(y[kept], (residual + x / 0.75)[kept], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(y[~kept], residual[~kept], rtol=1e-4, atol=1e-5)
    y.sum().backward()
    torch.testing.assert_close(x.grad, kept.float() / 0.75, rtol=1e-4, atol=0)
    torch.testing.assert_close(residual.grad, torch.ones_like(residual))
    assert torch.equal(dropout_add(x, residual, 0.25, False), residual + x)


def naive_attention(q, k, v, key_mask, drop, p):
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    if key_mask is not None:
        scores = scores.masked_fill(~key_mask[:, None, None, :], float("-inf"))
    level = round(p * 65536) / 65536
    return (scores.softmax(-1).masked_fill(drop, 0) / (1 - level)) @ v


@pytest.mark.parametrize("padded", [False, True])
def test_attention_with_dropout_equals_the_formula(padded):
    """Forward and all gradients, with the masks that the seed gives."""
    shape, p = (2, 3, 10, 8), 0.2
    inputs = [torch.randn(shape, requires_grad=True) for _ in range(3)]
    key_mask = torch.ones(2, 10, dtype=torch.bool)
    key_mask[1, 6:] = not padded
    torch.manual_seed(3)
    result = attention(*inputs, key_mask if padded else None, p)
    torch.manual_seed(3)
    drop = (keep_mask(RandomBits().draw((6, 10, 10)), p) == 0).view(2, 3, 10, 10)
    expected = naive_attention(*inputs, key_mask if padded else None, drop, p)
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)
    upstream = torch.randn_like(result)
    ours = torch.autograd.grad(result, inputs, upstream)
    theirs = torch.autograd.grad(expected, inputs, upstream)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_attention_in_bf16_keeps_its_dtype():
    q = torch.randn(1, 2, 5, 8, dtype=torch.bfloat16, requires_grad=True)
    y = attention(q, q, q, None, 0.1)
    y.sum().backward()
    assert y.dtype == q.grad.dtype == torch.bfloat16
