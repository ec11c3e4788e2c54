"""Weights of a pretraining checkpoint, fairseq's, Meta's or ours, in a model."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch

from common import checkpoint_file
from common.checkpoint_file import CheckpointError
from data2vec.model.teacher import WithTeacher
from data2vec.model.text_model import build_model
from data2vec.weights.fairseq_names import to_todays_names
from data2vec.weights.vision_weights import to_our_names

# weights that a fine-tuned or converted model may lack
OPTIONAL = ("encoder.regression_head.", "encoder.sentence_encoder.version", "final_proj.", "mask_emb", "encoder.norm.")


def load_weights(model: torch.nn.Module, checkpoint: dict[str, Any], path: str | Path) -> str:
    """Student, head and teacher from a pretraining checkpoint (which may hold a bare state_dict).

    A published, fine-tuned or converted checkpoint has no head (of images, maybe no mask token and final norm either):
    the model then keeps its own. Names may be those of older releases of fairseq, of images those of the paper's code.

    Returns:
        What was left out or is new, in words; "" where everything is there.

    Raises:
        CheckpointError: no checkpoint of a model, or keys or shapes are another model's; names what differs.
    """
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get("model", checkpoint), dict):
        raise CheckpointError(f"{path}: holds no model's weights (a dict by name, or one below 'model')")
    weights = OrderedDict(checkpoint.get("model", checkpoint))
    key = "_ema" if isinstance(model, WithTeacher) else "encoder._ema"
    teacher = weights.pop(key, None)
    weights, left_out = to_todays_names(to_our_names(weights))
    if teacher is not None:  # old checkpoints of fp16 runs hold it in fp16
        renamed, _ = to_todays_names(to_our_names(teacher))
        weights[key] = {name: value.float() for name, value in renamed.items()}
    try:
        missing, unexpected = model.load_state_dict(weights, strict=False)
        serious = [name for name in missing if not name.startswith(OPTIONAL)]
        if serious or unexpected:
            raise RuntimeError(f"missing {serious[:3]}, not known here {unexpected[:3]}")
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:400]
        raise CheckpointError(
            f"{path}: does not fit this model: {reason}. Is the configuration that of the checkpoint (layers, sizes, "
            "vocabulary)?"
        ) from None
    new = sorted({next(o for o in OPTIONAL if n.startswith(o)).rstrip(".") for n in missing if "version" not in n})
    words = [f"{', '.join(left_out)} not used"] if left_out else []
    return "; ".join(words + ([f"{', '.join(new)} as initialised"] if new else []))


def load_pretrained(path: Path) -> torch.nn.Module:
    """The model of a checkpoint, built from the configuration that it carries.

    Raises:
        CheckpointError: it is damaged, has no such configuration, or is of another kind of model.
    """
    checkpoint = checkpoint_file.load(path)
    try:
        config, weights = checkpoint["cfg"]["model"], checkpoint["model"]
        name = config["_name"]
    except (KeyError, TypeError):
        raise CheckpointError(f"{path}: no pretraining checkpoint (it has no 'model' and 'cfg.model._name')") from None
    words = to_todays_names(weights)[0].get("encoder.sentence_encoder.embed_tokens.weight")
    if name == "data2vec_vision":
        from data2vec.model.vision_model import build_vision_model  # timm, which a text run does without

        model = build_vision_model(config)
    elif name == "data2vec_text" and words is not None:
        model = build_model(config, len(words))
    else:
        raise CheckpointError(f"{path}: holds a model of {name}, not of data2vec_text or data2vec_vision")
    load_weights(model, checkpoint, path)
    return model
