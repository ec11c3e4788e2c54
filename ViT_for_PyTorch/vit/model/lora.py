"""LoRA (Hu et al., 2021): low-rank additions to the frozen linear layers of the blocks, by peft; merging needs no peft.

While training, a layer `attn.qkv` is `attn.qkv.base_layer` (frozen) + scale x `lora_B` `lora_A`, scale = alpha / rank.
The checkpoints to go on from have these parts; `best.pt` and whatever reads weights have the merged, plain layers.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from common.errors import UsageError

LAYERS = ("qkv", "proj", "fc1", "fc2")  # of a block: attention's two, the MLP's two
ADAPTER = "default"  # peft's own name for the only adapter


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
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise UsageError(f"model.train=lora needs peft ({error}): pip install peft -c ../constraints.txt") from None
    names = "|".join(chosen_layers(layers))
    settings = LoraConfig(r=rank, lora_alpha=alpha, target_modules=rf"blocks\.\d+\.\w+\.({names})")
    inject_adapter_in_model(settings, model, adapter_name=ADAPTER)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name or name.startswith("head."))


def has_adapters(state: dict[str, Tensor]) -> bool:
    """Whether weights are of a model with adapters."""
    return any(".base_layer." in name for name in state)


def merged(state: dict[str, Tensor], scale: float) -> dict[str, Tensor]:
    """The weights of the plain model that computes the same: base + scale x B A, by the plain names.

    Args:
        state: of a model with adapters, by name.
        scale: alpha / rank.
    """
    plain: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if ".lora_" in name:
            continue
        layer, found, kind = name.partition(".base_layer.")
        if found and kind == "weight":
            down = state[f"{layer}.lora_A.{ADAPTER}.weight"]  # [rank, in]
            up = state[f"{layer}.lora_B.{ADAPTER}.weight"]  # [out, rank]
            tensor = (tensor.float() + scale * (up.float() @ down.float())).to(tensor.dtype)  # [out, in]
        plain[f"{layer}.{kind}" if found else name] = tensor
    return plain


def scale_of(options: dict[str, Any]) -> float:
    """alpha / rank of the "model" section of a run's configuration."""
    return options["lora_alpha"] / options["lora_rank"]
