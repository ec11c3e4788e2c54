"""LoRA's additions (Hu et al., 2021) as peft puts them into a model, and weights without them: merging needs no peft.

A layer `qkv` becomes `qkv.base_layer` (frozen) + scale x `lora_B` `lora_A`, scale = alpha / rank.
"""

from __future__ import annotations

from torch import Tensor, nn

from common.errors import UsageError

_NAME = "default"  # peft's own name for the only adapter


def inject(model: nn.Module, layers: str, rank: int, alpha: float, option: str) -> None:
    """Puts additions into the layers whose names match the pattern, in place; zero at first, so nothing changes.

    Raises:
        UsageError: peft, which `option` needs, is not installed.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
        from peft.tuners.lora import LoraLayer
    except ImportError as error:
        raise UsageError(f"{option} needs peft ({error}): pip install peft -c ../constraints.txt") from None
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=alpha, target_modules=layers), model, adapter_name=_NAME)
    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            # under autocast peft's cast to fp32 is undone at once: the input would be kept twice for the backward pass
            layer.cast_input_dtype_enabled = False


def has_adapters(state: dict[str, Tensor]) -> bool:
    """Whether weights are of a model with additions."""
    return any(".base_layer." in name for name in state)


def merged(state: dict[str, Tensor], scale: float) -> dict[str, Tensor]:
    """The weights of the plain model that computes the same: base + scale x B A, by the plain names.

    Args:
        state: of a model with additions or without, by name.
        scale: alpha / rank.
    """
    plain: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if ".lora_" in name:
            continue
        layer, found, kind = name.partition(".base_layer.")
        if found and kind == "weight":
            down = state[f"{layer}.lora_A.{_NAME}.weight"]  # [rank, in]
            up = state[f"{layer}.lora_B.{_NAME}.weight"]  # [out, rank]
            tensor = (tensor.float() + scale * (up.float() @ down.float())).to(tensor.dtype)  # [out, in]
        plain[f"{layer}.{kind}" if found else name] = tensor
    return plain
