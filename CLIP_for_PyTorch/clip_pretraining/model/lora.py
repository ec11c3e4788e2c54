"""LoRA (arXiv:2106.09685): low-rank additions to the frozen linear layers of the towers, by peft.

While training, a layer `q_proj` is `q_proj.base_layer` (frozen) + alpha / rank x `lora_B` `lora_A`. Checkpoints have
these parts; every folder for users has the merged, plain layers, and needs no peft.
"""

from __future__ import annotations

from torch import Tensor
from transformers import PreTrainedModel

from common.errors import UsageError

LAYERS = "q_proj|k_proj|v_proj|out_proj|fc1|fc2|query|key|value|dense"  # CLIP's and RoBERTa's
ADAPTER = "default"  # peft's own name for the only adapter
_WHOLE = ("visual_projection.", "text_projection.", "logit_scale", "logit_bias")  # trained beside the additions


def add(model: PreTrainedModel, rank: int, alpha: float) -> None:
    """Puts additions into the layers of the towers that are trained; only they, projections and scale are, from now on.

    They are zero at first (`lora_B`), so that the model computes what it did.

    Raises:
        UsageError: peft is not installed, or both towers are frozen.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise UsageError(f"--lora_rank needs peft ({error}): pip install peft -c ../constraints.txt") from None
    towers = [
        name
        for name in ("vision_model", "text_model")
        if any(p.requires_grad for p in getattr(model, name).parameters())
    ]
    if not towers:
        raise UsageError("--lora_rank adds to the towers that are trained, and both are frozen: leave one of them out")
    settings = LoraConfig(
        r=rank, lora_alpha=alpha, target_modules=rf"({'|'.join(towers)})\.encoder\..*\.({LAYERS})", lora_dropout=0.0
    )
    inject_adapter_in_model(settings, model, adapter_name=ADAPTER)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".lora_" in name or name.startswith(_WHOLE))


def merged(state: dict[str, Tensor], scale: float) -> dict[str, Tensor]:
    """The weights of the plain model that computes the same, by the plain names: base + scale x B A.

    Args:
        state: whole tensors, of a model with additions or without.
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
            tensor = tensor + scale * (up @ down)  # [out, in]
        plain[f"{layer}.{kind}" if found else name] = tensor
    return plain
