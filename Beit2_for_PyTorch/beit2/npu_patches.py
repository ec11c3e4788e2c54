"""What BEiT v2 does otherwise on an Ascend NPU, each change a named function with its reason; nothing elsewhere.

NPU_PATCHES_OFF=NAME,... leaves patches out. Run on a simulated npu device (ci/fake_npu), not on Ascend hardware.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from beit2.blocks import Attention, attend
from common import npu


def use_fused_attention(model: nn.Module) -> None:
    """torch_npu's kernel where the relative position bias is not trained: the frozen tokenizer, and evaluation.

    A float mask makes torch_npu's own `scaled_dot_product_attention` fall back to plain math, and the kernel that takes
    a bias has no gradient for it. torch_npu 2.1 and newer.
    """
    for module in model.modules():
        if isinstance(module, Attention):
            module.attend = fused_attend


def fused_attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float, dropout: float = 0.0) -> Tensor:
    """`attend` by the fused kernel, in half precision and for a bias without gradient; else `attend` itself."""
    trainable = bias is not None and bias.requires_grad and torch.is_grad_enabled()
    if trainable or q.dtype not in (torch.float16, torch.bfloat16):
        return attend(q, k, v, bias, scale, dropout)
    return npu.fused_attention(q, k, v, scale, bias=bias, p=dropout)


PATCHES = {"exact_gelu": npu.use_exact_gelu, "fused_attention": use_fused_attention}


def apply(model: nn.Module, tokenizer: nn.Module | None, device: torch.device) -> None:
    """Prepares the model and the tokenizer that labels for it, on their device."""
    if npu.is_npu(device):
        for patch in npu.chosen(PATCHES).values():
            for module in {model, tokenizer} - {None}:
                patch(module)
