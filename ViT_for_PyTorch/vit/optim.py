"""Optimizer: AdamW over layer-decayed parameter groups (facebookresearch/mae util/lr_decay.py), opt-in weight EMA."""

from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from timm.optim import param_groups_layer_decay
from timm.utils import ModelEmaV3
from torch import nn


def layer_decay_groups(model: VisionTransformer, weight_decay: float, layer_decay: float) -> list[dict[str, Any]]:
    """Parameter groups {"params", "lr_scale", "weight_decay"}: depth + 2 layers, lr_scale = layer_decay^(last - layer).

    Biases, norms, the class token and the positional embedding are not decayed. `layer_decay=1` gives scale 1 to all.
    """
    return param_groups_layer_decay(
        model,
        weight_decay=weight_decay,
        no_weight_decay_list=model.no_weight_decay(),  # timm's default is (), which would decay pos_embed and cls_token
        layer_decay=layer_decay,
    )


def build_optimizer(
    model: VisionTransformer,
    *,
    weight_decay: float,
    layer_decay: float = 1.0,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
) -> torch.optim.AdamW:
    """AdamW (decoupled decay, bias correction) as one fused kernel. Set the rate with `set_learning_rate`."""
    return torch.optim.AdamW(
        layer_decay_groups(model, weight_decay, layer_decay), lr=0.0, betas=betas, eps=eps, fused=True
    )


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Gives every group `lr` times its layer's scale."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]


def build_ema(model: nn.Module, decay: float) -> ModelEmaV3 | None:
    """An exponential moving average of the weights, or None for decay 0.

    Call `ema.update(model)` after each optimizer step; evaluate and save `ema.module`.
    """
    return ModelEmaV3(model, decay=decay) if decay > 0 else None
