"""LoRA (arXiv:2106.09685): low-rank additions to the frozen linear layers of the towers (common/model/adapters.py).

Checkpoints have these parts; every folder for users has the merged, plain layers, and needs no peft.
"""

from __future__ import annotations

from transformers import PreTrainedModel

from common.errors import UsageError
from common.model import adapters

LAYERS = "q_proj|k_proj|v_proj|out_proj|fc1|fc2|query|key|value|dense"  # CLIP's and RoBERTa's
_WHOLE = ("visual_projection.", "text_projection.", "logit_scale", "logit_bias")  # trained beside the additions


def add(model: PreTrainedModel, rank: int, alpha: float) -> None:
    """Puts additions into the layers of the towers that are trained; only they, projections and scale are, from now on.

    They are zero at first (`lora_B`), so that the model computes what it did.

    Raises:
        UsageError: peft is not installed, or both towers are frozen.
    """
    towers = [
        name
        for name in ("vision_model", "text_model")
        if any(p.requires_grad for p in getattr(model, name).parameters())
    ]
    if not towers:
        raise UsageError("--lora_rank adds to the towers that are trained, and both are frozen: leave one of them out")
    adapters.inject(model, rf"({'|'.join(towers)})\.encoder\..*\.({LAYERS})", rank, alpha, "--lora_rank")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".lora_" in name or name.startswith(_WHOLE))
