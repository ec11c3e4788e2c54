"""What the device at hand makes the models do otherwise: one line in every script, nothing in the models."""

from __future__ import annotations

import torch
from torch import nn

from beit2 import cpu_patches, cuda_patches, npu_patches


def apply(
    model: nn.Module, tokenizer: nn.Module | None, device: torch.device, npu_recompute_attention: bool = False
) -> None:
    """Prepares the model, and the tokenizer that labels for it, for their device."""
    npu_patches.apply(model, tokenizer, device, npu_recompute_attention)
    cpu_patches.apply(model, tokenizer, device)
    cuda_patches.apply(model, tokenizer, device)
