"""What BEiT v2 does otherwise on CUDA. CUDA_PATCHES_OFF=NAME,... leaves patches out."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from beit2.model.blocks import Attention, attend
from common.model.patches import chosen


def align_attention_bias(model: nn.Module) -> None:
    """The memory-efficient kernel takes a bias whose rows are aligned to 8 elements; others fall back to plain math."""
    for module in model.modules():
        if isinstance(module, Attention):
            module.attend = attend_aligned


def attend_aligned(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float, dropout: float = 0.0) -> Tensor:
    """`attend` with a bias [.., K, N] whose rows lie a multiple of 8 elements apart; no value differs."""
    if bias is not None:
        length = bias.shape[-1]
        bias = F.pad(bias.to(q.dtype), (0, -length % 8))[..., :length]
    return attend(q, k, v, bias, scale, dropout)


PATCHES = {"aligned_bias": align_attention_bias}


def apply(model: nn.Module, tokenizer: nn.Module | None, device: torch.device) -> None:
    """Prepares the model and the tokenizer that labels for it, on their device."""
    if device.type != "cuda":
        return
    for patch in chosen(PATCHES, "CUDA_PATCHES_OFF").values():
        for module in {model, tokenizer} - {None}:
            patch(module)
