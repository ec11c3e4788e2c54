"""What a CPU does otherwise: bf16 products without bf16 instructions, bf16 attention, and memory that is kept.

**bf16 on x86 CPUs without bf16 instructions: the same mathematics at the fp32 rate.**

oneDNN emulates bf16 products there at about a fifth of the fp32 rate. A product of two bf16 numbers is exact in fp32
and both ways sum in fp32, so rounding the inputs to bf16, multiplying in fp32 and rounding the result gives the bf16
result, up to the order of the sum. Weight gradients stay in fp32 instead of passing through bf16; attention
probabilities are not rounded inside the fused attention. Nothing else differs in precision.

**bf16 attention on x86 CPUs that have them (but no AMX)**: written out in bf16 products with a softmax in fp32, as
autocast has the plain formula. torch's fused kernel takes twice the time there (197 tokens of 64, AMD EPYC).
"""

import contextlib
import ctypes
import sys
import types
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode


@cache
def has_bf16_instructions() -> bool:
    """Whether bf16 matmuls run natively; anything but x86 is left to PyTorch."""
    known = torch.cpu.get_capabilities()
    return known["architecture"] != "x86_64" or known["avx512_bf16"] or known["amx_bf16"]


@cache
def fused_attention_is_slow() -> bool:
    """Whether bf16 products written out are faster: measured with AVX512-BF16; with AMX, and elsewhere, not known."""
    known = torch.cpu.get_capabilities()
    return known["architecture"] == "x86_64" and known["avx512_bf16"] and not known["amx_bf16"]


class _Linear(torch.autograd.Function):
    """x [..., in] -> bf16 [..., out]. Keeps x in bf16 and the weight as it is for the backward pass, each only where a
    gradient needs it, and no fp32 copy of either; autograd of the plain formula would keep both."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        rounded = x.bfloat16()
        need_x, need_weight, _ = ctx.needs_input_grad
        ctx.save_for_backward(rounded if need_weight else None, weight if need_x else None)
        ctx.types = x.dtype, weight.dtype, bias.dtype if bias is not None else None
        bias = None if bias is None else bias.bfloat16().float()
        return F.linear(rounded.float(), weight.bfloat16().float(), bias).bfloat16()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        need_x, need_weight, need_bias = ctx.needs_input_grad
        x_type, weight_type, bias_type = ctx.types
        grad = grad.float()
        rows = grad.flatten(0, -2)  # [rows, out]
        return (
            (grad @ weight.bfloat16().float()).to(x_type) if need_x else None,
            (rows.T @ x.flatten(0, -2).float()).to(weight_type) if need_weight else None,
            rows.sum(0).to(bias_type) if need_bias else None,
        )


class _RoundToBf16(torch.autograd.Function):
    """fp32 -> nearest bf16 value, still as fp32; the gradient passes unchanged."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        return value.bfloat16().float()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


def _widened(value: Any) -> Any:
    """A floating-point tensor's bf16 values in fp32; anything else (sizes, boolean masks) as it is."""
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return value
    return value.float() if value.dtype == torch.bfloat16 else _RoundToBf16.apply(value)


def _wide(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`function` on bf16-rounded tensors in fp32 arithmetic, its result rounded to bf16."""

    def call(*tensors: Any, **options: Any) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            tensors = tuple(_widened(t) for t in tensors)
            options = {name: _widened(t) for name, t in options.items()}
            return function(*tensors, **options).bfloat16()

    return call


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    with torch.autocast("cpu", enabled=False):
        return _Linear.apply(x, weight, bias)


# `a @ b` and `a.matmul(b)` are the same function
_REPLACEMENTS = {F.linear: _linear} | {
    function: _wide(function) for function in (F.scaled_dot_product_attention, F.conv2d, torch.matmul, Tensor.matmul)
}


_LONGEST = 256  # tokens; measured with 197. What is kept for the backward pass grows with their square


def _attention(
    q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0, is_causal: bool = False,
    scale: float | None = None, **options: Any,
) -> Tensor:  # fmt: skip
    """F.scaled_dot_product_attention [B, H, N, d]; written out where there is nothing but q, k and v."""
    if attn_mask is not None or dropout_p or is_causal or options or k.shape[-2] > _LONGEST:
        return F.scaled_dot_product_attention(q, k, v, attn_mask, dropout_p, is_causal, scale=scale, **options)
    q, k, v = q.bfloat16(), k.bfloat16(), v.bfloat16()
    scores = (q * (q.shape[-1] ** -0.5 if scale is None else scale)) @ k.transpose(-2, -1)  # [B, H, N, N]
    return scores.softmax(-1, dtype=torch.float32).bfloat16() @ v


_ATTENTION = {F.scaled_dot_product_attention: _attention}


class _Replace(TorchFunctionMode):
    """Calls a replacement where the model calls one of the given functions."""

    def __init__(self, replacements: dict[Callable, Callable]):
        super().__init__()
        self.replacements = replacements

    def __torch_function__(self, func: Any, kinds: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        return self.replacements.get(func, func)(*args, **(kwargs or {}))


def cpu_kernels() -> contextlib.AbstractContextManager:
    """Context that brings these kernels in for what runs on the CPU under bf16 autocast. Not for compiled code.

    It belongs inside the blocks and not around the model, since gradient checkpointing runs a block again by itself.
    """
    if not (torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.bfloat16):
        return contextlib.nullcontext()
    if not has_bf16_instructions():
        return _Replace(_REPLACEMENTS)
    return _Replace(_ATTENTION) if fused_attention_is_slow() else contextlib.nullcontext()


def use_cpu_kernels(*modules: nn.Module) -> None:
    """Makes each module's forward run under `cpu_kernels`."""
    for module in modules:
        module.forward = types.MethodType(_forward_with_cpu_kernels, module)  # a method: a copied module gets its own


def _forward_with_cpu_kernels(module: nn.Module, *args: Any, **options: Any) -> Any:
    with cpu_kernels():
        return type(module).forward(module, *args, **options)


_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # glibc malloc.h


def keep_freed_memory() -> bool:
    """Tells glibc to serve large tensors from its heap and not to shrink it; returns whether that was possible.

    By default a block above some megabytes is mapped anew each time, and the kernel clears every page of it again: for
    elementwise operations that costs more than the arithmetic. Numbers are not touched.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):  # another C library
        return False
    return bool(mallopt(_M_MMAP_MAX, 0)) and bool(mallopt(_M_TRIM_THRESHOLD, 2**31 - 1))
