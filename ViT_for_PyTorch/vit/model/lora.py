"""LoRA (Hu et al., 2021): low-rank additions to the frozen linear layers of the blocks (common/model/adapters.py).

The checkpoints to go on from have these parts; `best.pt` and whatever reads weights have the merged, plain layers.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from common.errors import UsageError
from common.model import adapters

LAYERS = ("qkv", "proj", "fc1", "fc2")  # of a block: attention's two, the MLP's two


def chosen_layers(text: str) -> list[str]:
    """The layers of a text such as "qkv,proj". UsageError for any other name."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    unknown = [name for name in names if name not in LAYERS]
    if unknown or not names:
        raise UsageError(f"model.lora_layers={text}: choose some of {','.join(LAYERS)}, with commas")
    return names


def add(model: nn.Module, rank: int, alpha: float, layers: str) -> None:
    """Puts adapters into the blocks of a model, in place; they and the head are what is trained from now on.

    The additions are zero at first (`lora_B`), so that the model computes what it did.

    Raises:
        UsageError: peft is not installed.
    """
    names = "|".join(chosen_layers(layers))
    adapters.inject(model, rf"blocks\.\d+\.\w+\.({names})", rank, alpha, "model.train=lora")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name or name.startswith("head."))


def scale_of(options: dict[str, Any]) -> float:
    """alpha / rank of the "model" section of a run's configuration."""
    return options["lora_alpha"] / options["lora_rank"]
