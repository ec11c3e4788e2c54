"""FLOPs of a step against the formula of its model, and the table of peaks."""

import pytest
import torch
from torch import nn

from common import mfu

WIDTH, HEADS, TOKENS, BATCH, LAYERS = 64, 4, 24, 3, 2


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x):
        b, t, _ = x.shape
        q, k, v = self.qkv(x).view(b, t, 3, HEADS, -1).permute(2, 0, 3, 1, 4)  # [B, H, T, D] each
        mixed = nn.functional.scaled_dot_product_attention(q, k, v)  # [B, H, T, D]
        x = x + self.out(mixed.transpose(1, 2).reshape(b, t, -1))  # [B, T, C]
        return x + self.down(nn.functional.gelu(self.up(x)))


def test_a_transformer_s_step_has_the_flops_of_its_formula():
    model = nn.Sequential(*(Block() for _ in range(LAYERS)))
    with mfu.counter() as counter:
        model(torch.randn(BATCH, TOKENS, WIDTH, requires_grad=True)).sum().backward()
    weights = LAYERS * 12 * WIDTH**2
    forward = 2 * BATCH * TOKENS * weights + LAYERS * BATCH * 4 * TOKENS**2 * WIDTH
    # backward: twice the products, and fused attention computes its scores once more
    expected = 3 * forward + LAYERS * BATCH * 2 * TOKENS**2 * WIDTH
    assert counter.get_total_flops() == pytest.approx(expected, rel=0.01)


def test_peaks_are_of_the_card_and_a_cpu_s_is_measured(monkeypatch):
    monkeypatch.setattr(mfu, "describe", lambda device: device.name)
    card = type("Card", (), {"type": "cuda", "name": "NVIDIA H100 80GB HBM3"})()
    assert mfu.peak_flops(card, "bf16") == 989e12
    card.name = "NVIDIA H100 PCIe"
    assert mfu.peak_flops(card, "bf16") == 756e12
    card.type, card.name = "npu", "Ascend910B3"
    assert mfu.peak_flops(card, "fp16") == 313e12 and mfu.peak_flops(card, "fp32") is None
    card.name = "Ascend310P3"
    assert mfu.peak_flops(card, "fp16") is None
    assert 1e8 < mfu.peak_flops(torch.device("cpu"), "fp32") < 1e14
