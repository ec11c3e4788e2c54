"""Features of a frozen encoder, as DINO's and CLIP's users take them: CLS, the patches' mean, or both, of any block."""

from __future__ import annotations

import torch
from torch import Tensor

from beit2.model.vision_transformer import VisionTransformer

POOLS = ("cls", "mean", "cls_mean")


def block_states(encoder: VisionTransformer, images: Tensor, layer: int) -> Tensor:
    """Normalised images [B, 3, H, W] -> what block `layer`, counted from 1, makes of them: [B, 1 + N, C], CLS first."""
    x, bias = encoder.embed(images), encoder.shared_bias()
    for block in encoder.blocks[:layer]:
        x = block(x, bias)
    return x


def pooled(encoder: VisionTransformer, states: Tensor, layer: int, pool: str) -> Tensor:
    """States [B, 1 + N, C] of block `layer` -> features [B, C] ("cls", "mean") or [B, 2 C] ("cls_mean").

    After the last block they are normalised as the model itself does it: by `norm`, or in a model that averages the
    patches by `fc_norm` after the mean. An earlier block's states are taken as they are, as the linear probe does.
    """
    last = layer == len(encoder.blocks)
    if last:
        states = encoder.norm(states)
    parts = {"cls": states[:, 0], "mean": states[:, 1:].mean(dim=1)}  # [B, C]
    if last and encoder.fc_norm is not None:
        parts = {name: encoder.fc_norm(part) for name, part in parts.items()}
    return torch.cat([parts[name] for name in pool.split("_")], dim=1)
