"""Weights of a pretraining checkpoint, fairseq's, Meta's or ours, in a model."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from common import checkpoint_file
from common.checkpoint_file import CheckpointError
from data2vec.config.keys import MODELS, MULTI
from data2vec.model.encoder import SentenceEncoder
from data2vec.model.multi.model import Data2VecMulti, build_multi_model
from data2vec.model.teacher import WithTeacher
from data2vec.model.text_model import build_model
from data2vec.weights.fairseq_names import to_todays_names
from data2vec.weights.multi_weights import as_sentence_encoder
from data2vec.weights.vision_weights import to_our_names

ENCODER = "encoder.sentence_encoder."
MULTI_TEXT = "modality_encoders.TEXT.local_encoder"
SIZED = ("embed_tokens.weight", "embed_positions.weight", "layers.0.fc1.weight")  # which tell an encoder's sizes
# weights that a fine-tuned or converted model may lack
OPTIONAL = ("encoder.regression_head.", "encoder.sentence_encoder.version", "final_proj.", "mask_emb", "encoder.norm.")
OPTIONAL += ("classification_heads.",)


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
    weights, left_out = to_todays_names(to_our_names(weights), kept=model.state_dict())
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
            f"{path}: does not fit this model: {reason}. Give the configuration of the checkpoint (layers, sizes, "
            "vocabulary)"
        ) from None
    new = sorted({next(o for o in OPTIONAL if n.startswith(o)).rstrip(".") for n in missing if "version" not in n})
    words = [f"{', '.join(left_out)} not used"] if left_out else []
    return "; ".join(words + ([f"{', '.join(new)} as initialised"] if new else []))


def encoder_weights(checkpoint: Any, path: str | Path) -> dict[str, torch.Tensor]:
    """The student's encoder alone, "encoder.sentence_encoder." + name, of any text checkpoint, a fine-tuned one too.

    Raises:
        CheckpointError: there is none in it.
    """
    state = checkpoint.get("model", checkpoint) if isinstance(checkpoint, dict) else {}
    state = state if isinstance(state, dict) else {}
    if any(name.startswith(f"{MULTI_TEXT}.") for name in state):  # data2vec 2.0
        encoder = as_sentence_encoder(model_of(checkpoint, path))
        state = {f"{ENCODER}{name}": value for name, value in encoder.state_dict().items()}
    weights, _ = to_todays_names({k: v for k, v in state.items() if isinstance(v, torch.Tensor)})
    weights = {name: value for name, value in weights.items() if name.startswith(ENCODER)}
    if f"{ENCODER}embed_tokens.weight" not in weights:
        raise CheckpointError(f"{path}: holds no data2vec or RoBERTa text encoder ({ENCODER}embed_tokens.weight)")
    for name in SIZED:
        if f"{ENCODER}{name}" not in weights or weights[f"{ENCODER}{name}"].dim() != 2:
            raise CheckpointError(
                f"{path}: its encoder's {ENCODER}{name} is missing or no matrix: is it a part of one?"
            )
    return weights


def architecture(weights: Mapping[str, torch.Tensor], checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """Configuration keys of the encoder of `encoder_weights`; what shapes do not tell is the checkpoint's own."""
    layers = {name.split(".")[3] for name in weights if name.startswith(f"{ENCODER}layers.")}
    words, positions = (weights[f"{ENCODER}embed_{what}.weight"] for what in ("tokens", "positions"))
    model = (checkpoint.get("cfg") or {}).get("model") or {}
    own = model.get("transformer") or {}
    if model.get("_name") == MULTI:
        own = {**(model["modalities"]["text"]), "encoder": {"attention_heads": model["num_heads"]}}
    found = {
        "encoder.layers": len(layers),
        "encoder.embed_dim": words.shape[1],
        "encoder.ffn_embed_dim": len(weights[f"{ENCODER}layers.0.fc1.weight"]),
        "max_source_positions": len(positions) - 2,  # <s> and <pad>, whose rows are before the first position's
        "layernorm_embedding": f"{ENCODER}layernorm_embedding.weight" in weights,
        "no_scale_embedding": own.get("no_scale_embedding"),
        "encoder.attention_heads": (own.get("encoder") or {}).get("attention_heads"),
    }
    return {f"model.transformer.{key}": value for key, value in found.items() if value is not None}


def load_pretrained(path: Path) -> torch.nn.Module:
    """`model_of` a file."""
    return model_of(checkpoint_file.load(path), path)


def model_of(checkpoint: Any, path: Path) -> torch.nn.Module:
    """The model of a checkpoint, built from the configuration that it carries.

    Raises:
        CheckpointError: it is damaged, has no such configuration, or is of another kind of model.
    """
    try:
        config, weights = checkpoint["cfg"]["model"], checkpoint["model"]
        name = config["_name"]
        if not isinstance(weights, dict):
            raise TypeError
    except (KeyError, TypeError):
        raise CheckpointError(f"{path}: no pretraining checkpoint (it has no 'model' and 'cfg.model._name')") from None
    words = to_todays_names(weights)[0].get("encoder.sentence_encoder.embed_tokens.weight")
    if name == "data2vec_vision":
        from data2vec.model.vision_model import build_vision_model  # timm, which a text run does without

        model = build_vision_model(config)
    elif name == MULTI:
        words = weights.get(f"{MULTI_TEXT}.embed_tokens.weight")
        model = build_multi_model(config, None if words is None else len(words))
    elif name == "data2vec_text" and words is not None:
        model = build_model(config, len(words))
    else:
        raise CheckpointError(f"{path}: holds a model of {name}; one of {', '.join(MODELS)} is needed")
    load_weights(model, checkpoint, path)
    return model


def text_encoder(model: torch.nn.Module, teacher: bool, path: str | Path) -> SentenceEncoder:
    """Of a text model: the student's, or the teacher's. CheckpointError where there is none."""
    if teacher and model.teacher_holder.teacher is None:
        raise CheckpointError(f"{path}: holds no teacher (_ema)")
    if isinstance(model, Data2VecMulti):
        return as_sentence_encoder(model, teacher)
    return model.encoder.teacher if teacher else model.encoder.sentence_encoder
