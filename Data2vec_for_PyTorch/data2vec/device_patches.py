"""What the device at hand makes the models do otherwise: one line in every script, nothing in the models."""

from __future__ import annotations

import torch
from omegaconf import DictConfig
from torch import nn

from data2vec import cpu_patches, npu_patches
from data2vec.compiled_blocks import compile_blocks


def apply_to_config(config: DictConfig, device: torch.device, compiles: bool) -> list[str]:
    """Changes a training's configuration for its device, and for `--compile`; notes on what was changed."""
    notes = npu_patches.apply_to_config(config, device)
    buckets = npu_patches.use_length_buckets(config, "--compile") if compiles else None
    return [*notes, *([buckets] if buckets else [])]


def apply_to_model(model: nn.Module, device: torch.device, compiles: bool = False) -> None:
    """Prepares a model on its device, before it has a teacher. UsageError where it cannot be compiled."""
    npu_patches.apply_to_model(model, device)
    cpu_patches.apply_to_model(model, device)
    if compiles:
        compile_blocks(model, device)
