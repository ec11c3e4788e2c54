"""The CPU shortcuts compute what they replace: skipped pictures, and bf16 without bf16 instructions."""

import contextlib

import pytest
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Block

import vit
from common import cpu as cpu_kernels
from vit import cpu_patches


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = vit.build_model(img_size=32, patch_size=8, embed_dim=64, depth=2, num_heads=4, num_classes=5, drop_path=0.4)
    torch.nn.init.normal_(model.head.weight, std=0.1)
    cpu_patches.apply(model, torch.device("cpu"))
    return model


def loss_and_gradients(model, precision="fp32"):
    """Logits, loss and gradients of a fixed batch."""
    images = torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        logits = model(images)
    loss = F.cross_entropy(logits.float(), torch.arange(6) % 5)
    loss.backward()
    return logits, loss.item(), {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@contextlib.contextmanager
def plain_kernels(monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(cpu_patches, "cpu_kernels", contextlib.nullcontext)
        yield


def masked_forward(block, x, attn_mask=None, is_causal=False):
    """Stochastic depth as the definition has it: every branch computed, the dropped ones multiplied by zero."""
    rate = block.drop_path1.drop_prob
    for branch in (lambda h: block.attn(block.norm1(h)), lambda h: block.mlp(block.norm2(h))):
        kept = torch.rand(len(x)) >= rate
        x = x + branch(x) * (kept / (1 - rate)).view(-1, 1, 1)
    return x


def test_skipping_pictures_equals_multiplying_by_zero(model, monkeypatch):
    dropped_something = False
    for seed in range(4):
        torch.manual_seed(seed)
        _, loss, gradients = loss_and_gradients(model)
        state = torch.get_rng_state()
        with monkeypatch.context() as patch:
            patch.setattr(model.blocks[1], "forward", lambda x, **k: masked_forward(model.blocks[1], x))
            torch.manual_seed(seed)
            _, expected_loss, expected = loss_and_gradients(model)
        assert torch.equal(state, torch.get_rng_state())
        assert loss == pytest.approx(expected_loss, abs=1e-6)
        torch.testing.assert_close(gradients, expected, rtol=1e-4, atol=1e-6)
        torch.manual_seed(seed)
        dropped_something |= bool((torch.rand(6) < 0.4).any())
    assert dropped_something


def test_a_branch_dropped_for_all_pictures_still_has_gradients(model):
    model.blocks[1].drop_path1.drop_prob = 1.0 - 1e-9
    gradients = loss_and_gradients(model)[2]
    assert gradients["blocks.1.attn.qkv.weight"].abs().max() == 0


def test_evaluation_drops_nothing(model):
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        ours = model.eval()(images)
        plain = Block.forward
        for block in model.blocks:
            block.forward = lambda x, block=block, **k: plain(block, x)
        torch.testing.assert_close(model(images), ours)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_gradient_checkpointing_gives_the_same_gradients(model, monkeypatch, precision):
    monkeypatch.setattr(cpu_kernels, "has_bf16_instructions", lambda: False)
    gradients = []
    for checkpointing in (False, True):
        model.set_grad_checkpointing(checkpointing)
        torch.manual_seed(3)
        gradients.append(loss_and_gradients(model, precision)[2])
    torch.testing.assert_close(gradients[1], gradients[0])


def test_emulated_bf16_is_as_near_to_fp32_as_autocast(model, monkeypatch):
    monkeypatch.setattr(cpu_kernels, "has_bf16_instructions", lambda: False)

    def run(precision):
        torch.manual_seed(3)
        return loss_and_gradients(model, precision)

    exact, ours = run("fp32"), run("bf16")
    with plain_kernels(monkeypatch):
        autocast = run("bf16")
    assert ours[0].dtype == autocast[0].dtype == torch.float32  # the head rounds nothing
    torch.testing.assert_close(ours[0], autocast[0], rtol=0, atol=2e-2)

    def distance(result):
        return sum((result[2][name] - exact[2][name]).square().sum() for name in exact[2]).sqrt()

    norm = sum(value.square().sum() for value in exact[2].values()).sqrt()
    assert 1e-4 * norm < distance(ours) <= 1.1 * distance(autocast) < 2e-2 * norm
