"""What BEiT v2 does otherwise on an Ascend NPU, each change a named function with its reason; nothing elsewhere.

NPU_PATCHES_OFF=NAME,... leaves patches out. Run on a simulated npu device (ci/npu/fake), not on Ascend hardware.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from beit2.model.blocks import Attention, attend_plainly
from common import npu
from common.model import npu_layers
from common.model.patches import chosen


def use_fused_attention(model: nn.Module) -> None:
    """torch_npu's kernel where the relative position bias is not trained: the frozen tokenizer, and evaluation.

    A float mask makes torch_npu's own `scaled_dot_product_attention` fall back to plain math, and the kernel that takes
    a bias has no gradient for it. torch_npu 2.1 and newer.
    """
    for module in model.modules():
        if isinstance(module, Attention):
            module.attend = fused_attend


def fused_attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float, dropout: float = 0.0) -> Tensor:
    """`attend` by the fused kernel, in half precision and for a bias without gradient; else `attend_plainly`."""
    trainable = bias is not None and bias.requires_grad and torch.is_grad_enabled()
    if trainable or q.dtype not in (torch.float16, torch.bfloat16):
        return attend_plainly(q, k, v, bias, scale, dropout)
    return npu_layers.fused_attention(q, k, v, scale, bias=bias, p=dropout)


class _RecomputedAttention(torch.autograd.Function):
    """The fused kernel forward; backward through `attend_plainly`, computed anew, which has the bias's gradient."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(q, k, v, bias)
        ctx.scale = scale
        return npu_layers.fused_attention(q, k, v, scale, bias=bias)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        q = ctx.saved_tensors[0]
        with torch.enable_grad(), torch.autocast(q.device.type, dtype=q.dtype):
            inputs = [t.detach().requires_grad_() for t in ctx.saved_tensors]
            out = attend_plainly(*inputs, ctx.scale)
        return (*torch.autograd.grad(out, inputs, grad.to(out.dtype)), None)


def fused_attend_recomputed(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float, dropout: float = 0.0
) -> Tensor:
    """`fused_attend`, and for a trained bias the kernel forward and plain mathematics recomputed backward.

    Behind --npu_recompute_attention and not the default: it keeps no [B, H, N, N] weights but computes them twice.
    """
    trainable = bias is not None and bias.requires_grad and torch.is_grad_enabled()
    if trainable and dropout == 0.0 and q.dtype in (torch.float16, torch.bfloat16):
        return _RecomputedAttention.apply(q, k, v, bias, scale)
    return fused_attend(q, k, v, bias, scale, dropout)


PATCHES = {"exact_gelu": npu_layers.use_exact_gelu, "fused_attention": use_fused_attention}


def apply(model: nn.Module, tokenizer: nn.Module | None, device: torch.device, recompute: bool = False) -> None:
    """Prepares the model and the tokenizer that labels for it, on their device.

    recompute: `fused_attend_recomputed` where the model trains a bias.
    """
    if not npu.is_npu(device):
        return
    patches = chosen(PATCHES, "NPU_PATCHES_OFF")
    for patch in patches.values():
        for module in {model, tokenizer} - {None}:
            patch(module)
    if recompute and "fused_attention" in patches:
        for module in model.modules():
            if isinstance(module, Attention):
                module.attend = fused_attend_recomputed
