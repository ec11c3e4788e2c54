"""On CPUs: the same mathematics through faster kernels, chosen where PyTorch calls them.

* fp32 attention over a few hundred tokens: two batched matmuls and a softmax beat the fused CPU kernel, whose tiles are
  made for long sequences.
* bf16 on x86 without bf16 instructions: oneDNN then emulates bf16 products at about a fifth of the fp32 rate. A product
  of two bf16 numbers is exact in fp32 and both sum in fp32, so rounding the inputs to bf16, multiplying in fp32 and
  rounding the result gives the bf16 result (up to the order of the sum) at the fp32 rate.

Weight gradients stay in fp32 instead of passing through bf16; nothing else differs in precision.
"""

import contextlib
import math
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

_MAX_TOKENS = 400  # beyond, the attention matrix [B, heads, N, N] costs more memory than the matmuls save time


@cache
def has_bf16_instructions() -> bool:
    """Whether bf16 matmuls run natively; anything but x86 is left to PyTorch."""
    known = torch.cpu.get_capabilities()
    return known["architecture"] != "x86_64" or known["avx512_bf16"] or known["amx_bf16"]


class _RoundToBf16(torch.autograd.Function):
    """fp32 -> nearest bf16 value, still as fp32; the gradient passes unchanged."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        return value.bfloat16().float()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


def _widened(value: Tensor) -> Tensor:
    return value.float() if value.dtype == torch.bfloat16 else _RoundToBf16.apply(value)


def _matmul_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """softmax(Q K^T / sqrt(d)) V for [B, heads, N, d]."""
    scores = (query * (1.0 / math.sqrt(query.shape[-1]))) @ key.transpose(-2, -1)  # [B, heads, N, N]
    return scores.softmax(dim=-1) @ value  # [B, heads, N, d]


def _attention(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
    plain = not any(options.values()) and query.is_cpu and query.shape[-2] <= _MAX_TOKENS
    if not plain:
        return F.scaled_dot_product_attention(query, key, value, **options)
    return _matmul_attention(query, key, value)


def _wide(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`function` on bf16-rounded tensors in fp32 arithmetic, its result rounded to bf16."""

    def call(*tensors: Any, **options: Any) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            tensors = tuple(_widened(t) if isinstance(t, Tensor) else t for t in tensors)
            options = {name: _widened(t) if isinstance(t, Tensor) else t for name, t in options.items()}
            return function(*tensors, **options).bfloat16()

    return call


class _Replace(TorchFunctionMode):
    """Calls a replacement where the model calls one of the given functions."""

    def __init__(self, replacements: dict[Callable, Callable]):
        super().__init__()
        self.replacements = replacements

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        return self.replacements.get(func, func)(*args, **(kwargs or {}))


def cpu_kernels() -> contextlib.AbstractContextManager:
    """Context that brings these kernels in for what runs on the CPU, by the autocast in force. Not for compiled code.

    It belongs inside the blocks and not around the model, since gradient checkpointing runs a block again by itself.
    """
    if not torch.is_autocast_enabled("cpu"):
        return _Replace({F.scaled_dot_product_attention: _attention})
    if torch.get_autocast_dtype("cpu") != torch.bfloat16 or has_bf16_instructions():
        return contextlib.nullcontext()
    return _Replace({F.linear: _wide(F.linear), F.scaled_dot_product_attention: _wide(_attention)})
