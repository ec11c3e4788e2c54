"""LoRA (Hu et al., 2021): low-rank additions to the frozen linear layers of the blocks (common/model/adapters.py).

The checkpoints to go on from have these parts; `best.pt` and whatever reads weights have the merged, plain layers.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from common.errors import UsageError
from common.model import adapters

LAYERS = ("qkv", "proj", "fc1", "fc2")  # of a block: attention's two, the MLP's two
# small parts that may be trained as they are, beside the additions: they cost next to no memory
ALSO = {
    "bias": lambda name: name.endswith(".bias"),
    "norm": lambda name: "norm" in name,
    "stem": lambda name: name.startswith("patch_embed.") or name in ("pos_embed", "cls_token", "reg_token"),
}


def check(layers: str, also: str) -> None:
    """UsageError for names that are not in LAYERS and ALSO, or no layer at all."""
    if not _names(layers) or not set(_names(layers)) <= set(LAYERS):
        raise UsageError(f"model.lora_layers={layers}: choose some of {','.join(LAYERS)}, with commas")
    if not set(_names(also)) <= set(ALSO):
        raise UsageError(f"model.lora_also={also}: choose some of {','.join(ALSO)}, with commas, or nothing")


def add(model: nn.Module, rank: int, alpha: float, layers: str, also: str = "") -> None:
    """Puts adapters into the blocks of a model, in place; they, the head and what `also` names are what is trained.

    The additions are zero at first (`lora_B`), so that the model computes what it did.

    Raises:
        UsageError: peft is not installed.
    """
    pattern = rf"blocks\.\d+\.\w+\.({'|'.join(_names(layers))})"
    adapters.inject(model, pattern, rank, alpha, "model.train=lora")
    small = [ALSO[part] for part in _names(also)]
    for name, parameter in model.named_parameters():
        is_trained = "lora_" in name or name.startswith("head.") or any(is_of(name) for is_of in small)
        parameter.requires_grad_(is_trained)


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def scale_of(options: dict[str, Any]) -> float:
    """alpha / rank of the "model" section of a run's configuration."""
    return options["lora_alpha"] / options["lora_rank"]
