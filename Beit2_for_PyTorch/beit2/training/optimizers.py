"""Parameter groups and optimizers (reference `optim_factory.py`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from common.device import fused_adamw
from common.errors import UsageError

_NAMES_IN_TIMM = {"nesterov": "sgd", "nvnovograd": "novograd"}


def parameter_groups(
    model: nn.Module,
    weight_decay: float,
    skip: set[str] | None = None,
    layer_of: Callable[[str], int] | None = None,
    layer_scales: Sequence[float] | None = None,
) -> list[dict[str, Any]]:
    """Groups for the optimizer, in order of their first parameter.

    Not decayed: vectors and scalars, biases, and the names in `skip` (default: `model.no_weight_decay()`). The mask
    token, relative position tables and the output layer are decayed.

    Args:
        layer_of: layer number of a parameter's name, for layer-wise decay (see `layer_decay`).
        layer_scales: factor on the learning rate by layer number.

    Returns:
        Dictionaries of `params`, `weight_decay` and `lr_scale`.
    """
    if skip is None:
        skip = model.no_weight_decay() if hasattr(model, "no_weight_decay") else set()
    groups: dict[tuple[int, bool], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        decayed = parameter.ndim > 1 and not name.endswith(".bias") and name not in skip
        layer = layer_of(name) if layer_of is not None else 0
        group = groups.setdefault(
            (layer, decayed),
            {
                "params": [],
                "weight_decay": weight_decay if decayed else 0.0,
                "lr_scale": layer_scales[layer] if layer_scales is not None else 1.0,
            },
        )
        group["params"].append(parameter)
    return list(groups.values())


def layer_decay(depth: int, decay: float) -> tuple[Callable[[str], int], list[float]]:
    """Layer-wise learning rate decay of a `depth`-block transformer: (layer of a name, scale of a layer).

    Layer 0 is the embedding, block k is k + 1, everything else the last; layer i is scaled by decay^(depth + 1 - i).
    """

    def layer_of(name: str) -> int:
        if name in ("cls_token", "mask_token", "pos_embed") or name.startswith("patch_embed"):
            return 0
        if name.startswith("blocks."):
            return int(name.split(".")[1]) + 1
        return depth + 1

    return layer_of, [decay ** (depth + 1 - i) for i in range(depth + 2)]


def create_optimizer(
    name: str,
    groups: list[dict[str, Any]],
    lr: float,
    eps: float | None = None,
    betas: Sequence[float] | None = None,
    momentum: float = 0.9,
    device: torch.device | None = None,
) -> torch.optim.Optimizer:
    """An optimizer of the reference's names, `[lookahead_]name`.

    adamw, adam, nadam, radam and sgd are torch's; the rest are timm's of the same name. AdamW is torch's fused kernel
    where the device has one: the same update in one pass over memory. eps and betas go to those that have them.

    Raises:
        UsageError: unknown name, numbers it refuses, or an optimizer that needs second derivatives.
    """
    options: dict[str, Any] = {} if eps is None else {"eps": eps}
    options |= {} if betas is None else {"betas": tuple(betas)}
    *lookahead, own_name = name.lower().split("_")
    try:
        if name.lower() == "adamw":
            return torch.optim.AdamW(groups, lr=lr, fused=fused_adamw(device or torch.device("cpu")), **options)
        from timm.optim import create_optimizer_v2

        timm_name = "_".join((*lookahead, _NAMES_IN_TIMM.get(own_name, own_name)))
        optimizer = create_optimizer_v2(groups, opt=timm_name, lr=lr, momentum=momentum, **options)
    except (AssertionError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"--opt {name}: {error or 'unknown optimizer'}") from error
    if getattr(optimizer, "is_second_order", False):
        raise UsageError(f"--opt {name}: needs second derivatives, which DDP and FSDP2 do not keep; choose another")
    return optimizer


def set_step(optimizer: torch.optim.Optimizer, lr: float | None, weight_decay: float | None) -> None:
    """Sets a step's learning rate (times each group's lr_scale) and weight decay (on groups that have any)."""
    for group in optimizer.param_groups:
        if lr is not None:
            group["lr"] = float(lr) * group.get("lr_scale", 1.0)
        if weight_decay is not None and group["weight_decay"] > 0:
            group["weight_decay"] = float(weight_decay)


def lr_range(optimizer: torch.optim.Optimizer) -> tuple[float, float]:
    """Largest and smallest learning rate of all groups."""
    rates = [float(group["lr"]) for group in optimizer.param_groups]
    return max(rates), min(rates)
