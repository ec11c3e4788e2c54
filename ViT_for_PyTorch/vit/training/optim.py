"""Optimizer: AdamW over layer-decayed parameter groups (facebookresearch/mae util/lr_decay.py), opt-in weight EMA."""

from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from timm.utils import ModelEmaV3
from torch import nn

from common.device import fused_adamw


def _layer_of(name: str, depth: int) -> int:
    """0 for the embeddings, 1..depth for the blocks, depth + 1 for the final norm and the head."""
    if name in ("cls_token", "reg_token", "pos_embed") or name.startswith(("patch_embed.", "norm_pre.")):
        return 0
    if name.startswith("blocks."):
        return int(name.split(".")[1]) + 1
    return depth + 1


def layer_decay_groups(model: VisionTransformer, weight_decay: float, layer_decay: float) -> list[dict[str, Any]]:
    """Parameter groups {"params", "lr_scale", "weight_decay"} of the trainable parameters, lower layers first.

    lr_scale = layer_decay^(depth + 1 - layer). Biases, norms, the class token and the positional embedding are not
    decayed. timm's `param_groups_layer_decay` equals this for average pooling only: it gives the `norm` of token
    pooling the last block's scale.
    """
    last, undecayed = len(model.blocks) + 1, model.no_weight_decay()
    groups: dict[tuple[int, bool], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        layer, decayed = _layer_of(name, len(model.blocks)), parameter.ndim > 1 and name not in undecayed
        group = groups.setdefault(
            (layer, decayed),
            {
                "params": [],
                "lr_scale": layer_decay ** (last - layer),
                "weight_decay": weight_decay if decayed else 0.0,
            },
        )
        group["params"].append(parameter)
    return [groups[key] for key in sorted(groups)]


def build_optimizer(
    model: VisionTransformer,
    *,
    weight_decay: float,
    layer_decay: float = 1.0,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
) -> torch.optim.AdamW:
    """AdamW (decoupled decay, bias correction), one kernel where the device has it. Rates: `set_learning_rate`."""
    groups = layer_decay_groups(model, weight_decay, layer_decay)
    fused = fused_adamw(next(model.parameters()).device)
    return torch.optim.AdamW(groups, lr=0.0, betas=betas, eps=eps, fused=fused)


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Gives every group `lr` times its layer's scale."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]


def build_ema(model: nn.Module, decay: float) -> ModelEmaV3 | None:
    """An exponential moving average of the weights, or None for decay 0.

    Call `ema.update(model)` after each optimizer step; evaluate and save `ema.module`. Frozen weights are the model's
    own tensors, not a second copy.
    """
    if decay <= 0:
        return None
    average = ModelEmaV3(model, decay=decay)
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            owner, _, kind = name.rpartition(".")
            average.module.get_submodule(owner).register_parameter(kind, parameter)
    return average
