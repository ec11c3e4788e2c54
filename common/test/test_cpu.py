"""bf16 products on CPUs without bf16 instructions; whole models are in the projects' tests."""

import contextlib

import pytest
import torch
import torch.nn.functional as F

from common import cpu as cpu_kernels

PRODUCTS = {
    "linear": (F.linear, (40, 64), (32, 64), (32,)),
    "matmul": (lambda a, b: a @ b, (2, 40, 64), (2, 64, 32)),
    "conv2d": (lambda *tensors: F.conv2d(*tensors, stride=4), (2, 3, 16, 16), (32, 3, 4, 4), (32,)),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_an_emulated_product_equals_the_bf16_product(monkeypatch, name):
    """Its result but for the last bit, where the order of the sum decides; its gradients as near to fp32 as bf16's."""
    monkeypatch.setattr(cpu_kernels, "has_bf16_instructions", lambda: False)
    torch.manual_seed(0)
    function, *shapes = PRODUCTS[name]
    tensors = [torch.randn(shape, requires_grad=True) for shape in shapes]

    def run():
        out = function(*tensors)
        return out, torch.autograd.grad(out.float().square().sum(), tensors)

    _, exact = run()
    with torch.autocast("cpu", torch.bfloat16):
        expected, theirs = run()
        with cpu_kernels.cpu_kernels():
            ours, gradients = run()
    assert ours.dtype == torch.bfloat16 and (ours == expected).float().mean() > 0.98
    torch.testing.assert_close(ours, expected, rtol=1e-2, atol=1e-2)
    for a, b, c in zip(gradients, theirs, exact, strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        assert (a - c).norm() <= 1.1 * (b - c).norm() < 1e-2 * c.norm()


def test_a_boolean_mask_stays_one(monkeypatch):
    monkeypatch.setattr(cpu_kernels, "has_bf16_instructions", lambda: False)
    q, mask = torch.randn(1, 2, 6, 8), torch.ones(6, 6, dtype=torch.bool).tril()
    expected = F.scaled_dot_product_attention(q, q, q, attn_mask=mask)
    with torch.autocast("cpu", torch.bfloat16), cpu_kernels.cpu_kernels():
        ours = F.scaled_dot_product_attention(q, q, q, attn_mask=mask)
    torch.testing.assert_close(ours.float(), expected, rtol=0, atol=3e-2)


def test_fp32_fp16_and_native_bf16_are_left_alone(monkeypatch):
    assert isinstance(cpu_kernels.cpu_kernels(), contextlib.nullcontext)
    monkeypatch.setattr(cpu_kernels, "has_bf16_instructions", lambda: True)
    monkeypatch.setattr(cpu_kernels, "fused_attention_is_slow", lambda: False)
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype):
            assert isinstance(cpu_kernels.cpu_kernels(), contextlib.nullcontext)


def test_bf16_attention_is_that_of_autocast_written_out(monkeypatch):
    """Its gradients too; under a mask, or with dropout, it is torch's own."""
    monkeypatch.setattr(cpu_kernels, "has_bf16_instructions", lambda: True)
    monkeypatch.setattr(cpu_kernels, "fused_attention_is_slow", lambda: True)
    torch.manual_seed(0)
    qkv = torch.randn(3, 2, 4, 20, 16, requires_grad=True)

    def run(function, **options):
        with torch.autocast("cpu", torch.bfloat16), cpu_kernels.cpu_kernels():
            out = function(*qkv.bfloat16(), **options)
        return out, *torch.autograd.grad(out.float().square().sum(), qkv)

    def plain(q, k, v):
        return (q @ k.transpose(-2, -1) * 0.25).softmax(-1) @ v  # autocast's softmax is in fp32

    fused = F.scaled_dot_product_attention
    for ours, theirs in zip(run(fused), run(plain), strict=True):
        torch.testing.assert_close(ours.float(), theirs.float(), rtol=2e-2, atol=2e-2)
    exact = fused(*qkv.float())
    assert (run(fused)[0].float() - exact).norm() < 6e-3 * exact.norm()
    mask = torch.ones(20, 20, dtype=torch.bool).tril()
    assert torch.equal(run(fused, attn_mask=mask)[0], fused(*qkv.bfloat16(), attn_mask=mask))


@pytest.mark.parametrize("trained", ["input", "weight"])
def test_an_emulated_product_keeps_what_a_gradient_needs_and_nothing_else(monkeypatch, trained):
    monkeypatch.setattr(cpu_kernels, "has_bf16_instructions", lambda: False)
    x, weight = torch.randn(40, 64), torch.randn(32, 64)
    kept = []
    {"input": x, "weight": weight}[trained].requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.shape), lambda shape: None):
        with torch.autocast("cpu", torch.bfloat16), cpu_kernels.cpu_kernels():
            F.linear(x, weight)
    assert kept == [weight.shape if trained == "input" else x.shape]
