"""The reference's model names, and `nano`, `tiny` and `small` ones for people with little data."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from torch import nn

from beit2.model.masked_image_model import MaskedImageModel
from beit2.model.tokenizer import VQKD, build_tokenizer, load_tokenizer_weights
from beit2.model.vision_transformer import VisionTransformer
from common.errors import UsageError

# width, depth, heads
_SIZES = {
    "tiny": {"embed_dim": 192, "depth": 12, "num_heads": 3},
    "small": {"embed_dim": 384, "depth": 12, "num_heads": 6},
    "base": {"embed_dim": 768, "depth": 12, "num_heads": 12},
    "24x544": {"embed_dim": 544, "depth": 24, "num_heads": 16},
    "large": {"embed_dim": 1024, "depth": 24, "num_heads": 16},
}
_HUGE = {"embed_dim": 1280, "depth": 32, "num_heads": 16, "patch_size": 14}
_5B = {"embed_dim": 4096, "depth": 21, "num_heads": 16}
# for pictures of 48 pixels on a CPU; a narrow model needs larger initial weights than 768 values do
_NANO = {"embed_dim": 96, "depth": 4, "num_heads": 4, "patch_size": 8, "img_size": 48, "init_std": 0.08}
_EARLY_LAYERS = {"tiny": 9, "small": 9, "base": 9, "24x544": 21, "large": 21}


def _pretraining_models() -> dict[str, dict[str, Any]]:
    models = {}
    for size, shape in _SIZES.items():
        head = {"cls_pt": True, "early_layers": _EARLY_LAYERS[size]}
        models[f"beit_{size}_patch16_224_8k_vocab"] = shape | {"cls_pt": False}
        models[f"beit_{size}_patch16_224_8k_vocab_cls_pt"] = shape | head
    for size in (192, 256):
        models[f"beit_base_patch16_{size}_8k_vocab"] = _SIZES["base"] | {"img_size": size, "cls_pt": False}
    models["beit_huge_patch14_224_8k_vocab"] = _HUGE | {"cls_pt": False}
    models["beit_nano_patch8_48_8k_vocab_cls_pt"] = _NANO | {"cls_pt": True, "early_layers": 3, "head_layers": 1}
    models["beit_huge_5B_cls_pt"] = _5B | {"cls_pt": True, "early_layers": 6}
    return models


def _finetuning_models() -> dict[str, dict[str, Any]]:
    sizes = {"tiny": (224,), "small": (224,), "base": (224, 256, 384), "24x544": (224,), "large": (224, 384, 512)}
    models = {
        f"beit_{size}_patch16_{pixels}": _SIZES[size] | {"img_size": pixels}
        for size, resolutions in sizes.items()
        for pixels in resolutions
    }
    return models | {"beit_huge_patch14_224": dict(_HUGE), "beit_nano_patch8_48": dict(_NANO)}


PRETRAINING_MODELS = _pretraining_models()
FINETUNING_MODELS = _finetuning_models()

_BASE_TOKENIZER = {"dim": 768, "depth": 12, "heads": 12}
TOKENIZERS: dict[str, dict[str, Any]] = {
    "vqkd_encoder_base_decoder_1x768x12_clip": _BASE_TOKENIZER | {"decoder_depth": 1, "decoder_out_dim": 512},
    "vqkd_encoder_base_decoder_3x768x12_clip": _BASE_TOKENIZER | {"decoder_depth": 3, "decoder_out_dim": 512},
    "vqkd_encoder_base_decoder_1x768x12_dino": _BASE_TOKENIZER | {"decoder_depth": 1, "decoder_out_dim": 768},
}
for _size, _shape in (
    ("tiny", {"dim": 192, "depth": 12, "heads": 3}),
    ("small", {"dim": 384, "depth": 12, "heads": 6}),
):
    for _teacher, _out in (("clip", 512), ("dino", 384)):
        _name = f"vqkd_encoder_{_size}_decoder_1x{_shape['dim']}x{_shape['heads']}_{_teacher}"
        TOKENIZERS[_name] = _shape | {"decoder_depth": 1, "decoder_out_dim": _out}

TOKENIZERS["vqkd_encoder_nano_decoder_1x96x4_dino"] = {
    "dim": 96, "depth": 2, "heads": 4, "patch_size": 8, "img_size": 48, "decoder_depth": 1, "decoder_out_dim": 192,
}  # fmt: skip


def create_model(name: str, **overrides) -> nn.Module:
    """A pretraining or fine-tuning model by its reference name.

    Args:
        overrides: any argument of `MaskedImageModel` or `VisionTransformer`.

    Raises:
        UsageError: unknown name.
    """
    if name in PRETRAINING_MODELS:
        defaults = {"use_shared_rel_pos_bias": True, "init_values": 0.1}
        return MaskedImageModel(**(defaults | PRETRAINING_MODELS[name] | overrides))
    if name in FINETUNING_MODELS:
        defaults = {"use_rel_pos_bias": True, "use_abs_pos_emb": False, "init_values": 0.1}
        return VisionTransformer(**(defaults | FINETUNING_MODELS[name] | overrides))
    raise UsageError(f"--model {name}: unknown. Known: {', '.join((*PRETRAINING_MODELS, *FINETUNING_MODELS))}")


def create_tokenizer(name: str, weights: str | Path | None = None, **overrides) -> VQKD:
    """A tokenizer by its reference name, with the weights of a file when given.

    Args:
        overrides: any argument of `VQKD`, and `teacher`.

    Raises:
        UsageError: unknown name, or the file is not for it.
    """
    if name not in TOKENIZERS:
        raise UsageError(f"--tokenizer_model {name}: unknown. Known: {', '.join(TOKENIZERS)}")
    tokenizer = build_tokenizer(**(TOKENIZERS[name] | overrides))
    if weights is not None:
        load_tokenizer_weights(tokenizer, weights)
    return tokenizer


def heads_of(trained: argparse.Namespace | None) -> int | None:
    """Attention heads of the model that a training's options name; None where they name none."""
    shape = (PRETRAINING_MODELS | FINETUNING_MODELS).get(getattr(trained, "model", None))
    return shape and shape["num_heads"]
