"""bf16 products on CPUs without bf16 instructions; whole models are in the projects' tests."""

import contextlib

import torch
import torch.nn.functional as F

from common import cpu_kernels


def test_one_emulated_product_equals_the_bf16_product(monkeypatch):
    monkeypatch.setattr(cpu_kernels, "has_bf16_instructions", lambda: False)
    x, weight, bias = torch.randn(40, 64), torch.randn(32, 64), torch.randn(32)
    with torch.autocast("cpu", torch.bfloat16):
        expected = F.linear(x, weight, bias)
        with cpu_kernels.cpu_kernels():
            ours = F.linear(x, weight, bias)
    assert ours.dtype == torch.bfloat16
    assert (ours == expected).float().mean() > 0.98  # else the last bit, where the order of the sum decides
    torch.testing.assert_close(ours, expected, rtol=1e-2, atol=1e-2)


def test_fp32_fp16_and_native_bf16_are_left_alone(monkeypatch):
    assert isinstance(cpu_kernels.cpu_kernels(), contextlib.nullcontext)
    monkeypatch.setattr(cpu_kernels, "has_bf16_instructions", lambda: True)
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype):
            assert isinstance(cpu_kernels.cpu_kernels(), contextlib.nullcontext)
