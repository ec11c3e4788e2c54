"""MFU, model FLOPs utilisation: what a step's matrix products need, over what the device could do in that time.

The FLOPs are a formula of each model (forward, and what backward needs of it; nothing that is computed twice), which
tests hold to torch's counter. A peak is a data sheet's, or of a card that is not in the table, and of a CPU, the best
square product measured here.
"""

from __future__ import annotations

import re
import time

import torch

from common import device as devices

# FLOP/s of dense matrix products by the card's name as its driver gives it, to which a form and a size may be joined by
# dashes (-SXM4-80GB). Other words make another card: RTX 4090 Laptop GPU, H200 NVL, a MIG part. fp32 is without TF32.
_A100 = {"fp32": 19.5e12, "bf16": 312e12, "fp16": 312e12}
_HOPPER = {"fp32": 67e12, "bf16": 989.4e12, "fp16": 989.4e12}
PEAKS: dict[str, tuple[dict[str, float], str]] = {
    "Tesla V100-SXM2": ({"fp32": 15.7e12, "fp16": 125e12}, "NVIDIA V100 data sheet"),
    "NVIDIA A100": (_A100, "NVIDIA A100 data sheet"),
    "NVIDIA A100 80GB PCIe": (_A100, "NVIDIA A100 data sheet"),
    "NVIDIA L40S": ({"fp32": 91.6e12, "bf16": 362e12, "fp16": 362e12}, "NVIDIA L40S data sheet"),
    "NVIDIA GeForce RTX 4090": (
        {"fp32": 82.6e12, "bf16": 165.2e12, "fp16": 165.2e12},
        "NVIDIA Ada GPU architecture paper, fp32 accumulation",
    ),
    "NVIDIA H100 80GB HBM3": (_HOPPER, "NVIDIA H100 data sheet, SXM"),
    "NVIDIA H200": (_HOPPER, "NVIDIA H200 data sheet, SXM"),
    "Ascend910A": ({"fp16": 256e12}, "H. Liao et al., DaVinci, Hot Chips 31 (2019)"),
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SMALLEST, LARGEST, LONG_S = 512, 16384, 0.02  # of the square products where no document says


def transformer_flops(tokens: int, width: int, hidden: int, depth: int) -> float:
    """Of one sequence forward through `depth` blocks: four projections, the MLP, and attention over all tokens."""
    return depth * (tokens * (8.0 * width**2 + 4.0 * width * hidden) + 4.0 * tokens**2 * width)


def peak(device: torch.device, precision: str) -> tuple[float, str]:
    """FLOP/s of a device and where the number is from: a document, or a square product measured here.

    (0, "") for a precision that the card lacks, which its runs say themselves.
    """
    card = devices.describe(device)
    known, source = next((row for name, row in PEAKS.items() if re.fullmatch(f"{name}(-[\\w-]+)?", card)), ({}, ""))
    if device.type != "cpu" and precision in known:
        return known[precision], source
    try:
        # a device without instructions for half precision multiplies it fastest in fp32, as our runs do on a CPU
        found = max(_measured(device, dtype) for dtype in {DTYPES[precision], torch.float32})
        return found, "best matrix product measured here"
    except RuntimeError:
        return 0.0, ""


def _measured(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of the best square product, of matrices that grow until one takes long enough. Draws no random number."""
    best, size, seconds = 0.0, SMALLEST, 0.0
    while seconds < LONG_S and size <= LARGEST:
        left, right = (torch.full((size, size), 1.5, device=device, dtype=dtype) for _ in range(2))  # [S, S]
        seconds = min(_timed(device, left, right) for _ in range(4))
        best, size = max(best, 2 * size**3 / seconds), 2 * size
    return best


def _timed(device: torch.device, left: torch.Tensor, right: torch.Tensor) -> float:
    devices.synchronize(device)
    began = time.perf_counter()
    torch.mm(left, right)
    devices.synchronize(device)
    return time.perf_counter() - began
