"""The regression targets, the mean of the teacher's top layers, normalised (data2vec paper, section 3.3); the loss."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F


@dataclass(frozen=True)
class TargetConfig:
    """Normalisations, named as in fairseq's Data2VecTextConfig and applied in this order; `layers` is top-k."""

    average_top_k_layers: int = 8
    batch_norm_target_layer: bool = False
    instance_norm_target_layer: bool = False
    layer_norm_target_layer: bool = False
    layer_norm_targets: bool = False
    instance_norm_targets: bool = False

    @property
    def uses_whole_sequence(self) -> bool:
        """Batch and instance norm take statistics over all positions, padding included, as the reference does."""
        return self.batch_norm_target_layer or self.instance_norm_target_layer or self.instance_norm_targets


def average_targets(
    results: Iterable[torch.Tensor], config: TargetConfig, real: torch.Tensor | None = None
) -> torch.Tensor:
    """Normalises each layer's FFN output and averages.

    Args:
        results: fp32 or 16-bit [B, T, C] each, or [N, C] when `config.uses_whole_sequence` is False.
        real: bool [B, T], False at padding that instance norms leave out; None: they take everything, as the reference.

    Returns:
        fp32, of the same shape.
    """
    total = None
    count = 0
    for result in results:
        y = result.float()
        if config.batch_norm_target_layer:
            y = _over_time(F.batch_norm, y, running_mean=None, running_var=None, training=True)
        if config.instance_norm_target_layer:
            y = _instance_norm(y, real)
        if config.layer_norm_target_layer:
            y = F.layer_norm(y, y.shape[-1:])
        total = y if total is None else total.add_(y)
        count += 1
    target = total / count
    if config.layer_norm_targets:
        target = F.layer_norm(target, target.shape[-1:])
    if config.instance_norm_targets:
        target = _instance_norm(target, real)
    return target


def _instance_norm(y: torch.Tensor, real: torch.Tensor | None) -> torch.Tensor:
    """Each sample's channels, over its tokens: mean 0 and deviation 1. y fp32 [B, T, C]."""
    if real is None:
        return _over_time(F.instance_norm, y)
    weight = (real / real.sum(dim=1, keepdim=True).clamp(min=1)).unsqueeze(2)  # [B, T, 1]
    centred = y - (y * weight).sum(dim=1, keepdim=True)
    return centred * ((centred**2 * weight).sum(dim=1, keepdim=True) + 1e-5).rsqrt()


def _over_time(norm, y: torch.Tensor, **options) -> torch.Tensor:
    return norm(y.transpose(1, 2), **options).transpose(1, 2)  # the norms want [B, C, T]


def regression_loss(pred: torch.Tensor, target: torch.Tensor, beta: float) -> torch.Tensor:
    """Smooth L1 summed over all elements; `beta` 0 means the squared error, as in the reference."""
    if beta == 0:
        return F.mse_loss(pred, target, reduction="sum")
    return F.smooth_l1_loss(pred, target, reduction="sum", beta=beta)
