"""fp8: linear layers whose products are of 8-bit floats (Micikevicius et al., arXiv:2209.05433), in bf16 training.

    use_fp8(device, precision, "--fp8", blocks)     # their nn.Linear, in place: parameters and checkpoints stay

Inputs and weights are rounded to e4m3 and gradients to e5m2, each tensor scaled as a whole, anew in every step, so that
its largest value is the format's largest. Products are torch's own `scaled_mm`: on cards with fp8 (NVIDIA Ada and
Hopper on), and with the same values on a CPU, which is for tests and slow. No GPU was at hand: it is not measured.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.device import describe, no_autocast
from common.errors import UsageError

FIRST_CAPABILITY = (8, 9)  # Ada; Hopper is 9.0
MULTIPLE = 16  # of the sizes of a product, which cuBLAS asks for
_E4M3, _E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
_WHOLE = F.ScalingType.TensorWise


def use_fp8(device: torch.device, precision: str, option: str, blocks: Iterable[nn.Module]) -> None:
    """Lets every nn.Linear in `blocks` multiply in fp8.

    Raises:
        UsageError: naming `option`: the device has no fp8, the precision is not bf16, or a layer's sizes do not fit.
    """
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < FIRST_CAPABILITY:
        raise UsageError(f"{option}: {describe(device)} has no fp8 (Ada and Hopper cards have it); leave it out")
    if device.type not in ("cuda", "cpu"):
        raise UsageError(f"{option}: {describe(device)} has no fp8 that torch knows; leave it out")
    if precision != "bf16":
        raise UsageError(f"{option}: its products replace bf16's, not those of {precision}; give --precision bf16")
    for block in blocks:
        for name, module in block.named_modules():
            if type(module) is not nn.Linear:
                continue
            if module.in_features % MULTIPLE or module.out_features % MULTIPLE:
                sizes = f"{module.in_features} to {module.out_features}"
                raise UsageError(f"{option}: layer {name} ({sizes}) needs sizes that are multiples of {MULTIPLE}")
            module.__class__ = Fp8Linear


class Fp8Linear(nn.Linear):
    """nn.Linear in fp8, x [..., in] -> bf16 [..., out]."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """F.linear in fp8: x [..., in], weight [out, in], bias [out] -> bf16 [..., out]."""
    with no_autocast(x.device):
        out = _Linear.apply(x.flatten(0, -2), weight).unflatten(0, x.shape[:-1])  # [..., out]
        return out if bias is None else out + bias.to(out.dtype)


class _Linear(torch.autograd.Function):
    """x [rows, in], weight [out, in] -> bf16 [rows, out]. Keeps x in 8 bits for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        x8, x_scale = _rounded(x, _E4M3)
        w8, w_scale = _rounded(weight, _E4M3)
        ctx.save_for_backward(x8, x_scale, weight)
        ctx.x_dtype = x.dtype
        return _product(x8, x_scale, w8.t(), w_scale, torch.bfloat16, fast=True)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x8, x_scale, weight = ctx.saved_tensors
        g8, g_scale = _rounded(grad, _E5M2)  # [rows, out]
        x_grad = weight_grad = None
        if ctx.needs_input_grad[0]:
            w8, w_scale = _rounded(weight, _E4M3)
            x_grad = _product(g8, g_scale, _by_columns(w8), w_scale, torch.bfloat16).to(ctx.x_dtype)  # [rows, in]
        if ctx.needs_input_grad[1]:
            g8, x8 = _filled_up(g8), _filled_up(x8)
            weight_grad = _product(g8.t().contiguous(), g_scale, _by_columns(x8), x_scale, weight.dtype)  # [out, in]
        return x_grad, weight_grad


def _rounded(value: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """`value` in 8 bits, and what to multiply it by, float32 [1]. inf and nan stay such."""
    largest = torch.finfo(dtype).max
    scale = value.detach().abs().amax().float().clamp(min=1e-12) / largest
    return (value.float() / scale).clamp(-largest, largest).to(dtype), scale.reshape(1)


def _product(
    left: Tensor, left_scale: Tensor, right: Tensor, right_scale: Tensor, dtype: torch.dtype, fast: bool = False
) -> Tensor:
    """left [M, K] by rows, right [K, N] by columns -> [M, N]; `fast`, for the forward pass, sums as Hopper likes it."""
    scales = (left_scale, _WHOLE, right_scale, _WHOLE)
    return F.scaled_mm(left, right, *scales, output_dtype=dtype, use_fast_accum=fast)


def _by_columns(matrix: Tensor) -> Tensor:
    return matrix.t().contiguous().t()


def _filled_up(matrix: Tensor) -> Tensor:
    """[rows, n] with rows of zeros up to a multiple of 16."""
    bits = matrix.view(torch.uint8)  # in which zero is zero; few operations know 8-bit floats
    return F.pad(bits, (0, 0, 0, -len(matrix) % MULTIPLE)).view(matrix.dtype)
