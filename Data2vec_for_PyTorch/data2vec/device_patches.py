"""What the device at hand makes the models do otherwise: one line in every script, nothing in the models."""

from __future__ import annotations

import torch
from torch import nn

from data2vec import cpu_patches, npu_patches


def apply_to_model(model: nn.Module, device: torch.device) -> None:
    """Prepares a model on its device, before it has a teacher."""
    npu_patches.apply_to_model(model, device)
    cpu_patches.apply_to_model(model, device)
