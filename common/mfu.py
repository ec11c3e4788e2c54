"""What share of a device's peak a training step reaches (model FLOPs utilisation, arXiv:2204.02311 appendix B).

The products of one step are counted as they run, on the main rank; the peak of a card comes from its data sheet, that
of a CPU from a short matrix product on the threads that train.
"""

from __future__ import annotations

import re
import time
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from common.device import describe

# Dense TFLOP/s by (name of the card, precision); TF32 is off, so fp32 is the plain rate. Data sheets of the makers;
# 910A: Huawei's announcement of 2019; 910B3 and B4: Atlas 800T A2 and 300T A2. A card that is not here has no MFU.
_PEAKS: tuple[tuple[str, dict[str, float]], ...] = (
    (r"H100.*PCIe", {"bf16": 756, "fp16": 756, "fp32": 51}),
    (r"H100|H200|GH200", {"bf16": 989, "fp16": 989, "fp32": 67}),
    (r"A100", {"bf16": 312, "fp16": 312, "fp32": 19.5}),
    (r"L40S", {"bf16": 362, "fp16": 362, "fp32": 91.6}),
    (r"RTX 4090", {"bf16": 165, "fp16": 165, "fp32": 82.6}),
    (r"V100", {"fp16": 125, "fp32": 15.7}),
    (r"Ascend910B3", {"bf16": 313, "fp16": 313}),
    (r"Ascend910B4", {"bf16": 280, "fp16": 280}),
    (r"Ascend910(A|ProA)", {"fp16": 256}),
)
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def _attention(query: Any, key: Any, value: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return sdpa_flop_count(query, key, value)


def _attention_backward(gradient: Any, query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
    return sdpa_backward_flop_count(gradient, query, key, value)


# torch's table lacks the fused attention of CPUs
_FORMULAS = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}


def counter() -> FlopCounterMode:
    """A context that counts the products run inside; `get_total_flops()` has their sum.

    What is recomputed for activation checkpointing counts too; what a compiler has fused does not.
    """
    return FlopCounterMode(display=False, custom_mapping=_FORMULAS)


def peak_flops(device: torch.device, precision: str) -> float | None:
    """FLOP/s of one device in a precision; None for a card that is not in the table."""
    if device.type == "cpu":
        return measured_peak(_DTYPES[precision])
    name = describe(device)
    rates = next((rates for pattern, rates in _PEAKS if re.search(pattern, name)), {})
    return rates[precision] * 1e12 if precision in rates else None


def measured_peak(dtype: torch.dtype, side: int = 1024, rounds: int = 3) -> float:
    """FLOP/s of the best of a few products of two square matrices on this process's CPU threads."""
    a, b = (torch.randn(side, side).to(dtype) for _ in range(2))  # [side, side]
    best = float("inf")
    for _ in range(rounds + 1):  # the first warms up
        began = time.perf_counter()
        a @ b
        best = min(best, time.perf_counter() - began)
    return 2 * side**3 / best
