"""What BEiT v2 does otherwise on an Ascend NPU; nothing elsewhere."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from beit2.blocks import Attention, attend


def apply(model: nn.Module, tokenizer: nn.Module | None, device: torch.device, trainable_bias: bool = False) -> None:
    """Puts the fused attention where its result and gradient are right.

    The tokenizer is frozen, so its attention has no trainable bias. The model's bias is trainable, and nothing says
    that `npu_fusion_attention` has a gradient for `pse`: there it stays plain unless `trainable_bias` asks for it.
    """
    if device.type != "npu":
        return
    for module in (*(model.modules() if trainable_bias else ()), *(tokenizer.modules() if tokenizer else ())):
        if isinstance(module, Attention):
            module.attend = fused_attend


def fused_attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float, dropout: float = 0.0) -> Tensor:
    """`attend` by torch_npu's fused kernel, which takes half precision only."""
    if q.dtype not in (torch.float16, torch.bfloat16):
        return attend(q, k, v, bias, scale, dropout)
    pse = None
    if bias is not None:
        pse = bias.to(q.dtype).expand(q.shape[0], -1, -1, -1).contiguous()  # [B, H, K, N]
    return torch.ops.npu.npu_fusion_attention(
        q, k, v, q.shape[1], "BNSD", pse=pse, scale=scale, keep_prob=1.0 - dropout
    )[0]
