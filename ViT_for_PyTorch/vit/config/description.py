"""The description of a model that a file holds: as recorded by a training run, else as its tensors show it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from torch import Tensor

from common import checkpoint_file
from common.errors import UsageError
from vit.config.run_config import Config
from vit.model import timm_models
from vit.model.conv_stem import patch_size_of
from vit.model.vision_transformer import PRESETS, ViTConfig, field_names, preset
from vit.weights.loading import read_checkpoint


def config_of_run(config: Config, checkpoint: Path | None, training: bool, pooling: bool = False) -> ViTConfig:
    """What a configured run builds, but for the number of classes: of `model.name`, or of the checkpoint itself.

    A training builds the model that it names ("auto": the checkpoint's); evaluation always the checkpoint's. What a
    file does not tell (heads, mean, pooling of bare tensors) a name of timm's in `model.name` does.

    Args:
        pooling: whether an evaluation takes `model.global_pool`, as one of features may.

    Raises:
        UsageError: `model.name=auto` without a checkpoint.
        ValueError, CheckpointError: as `config_of_file`.
    """
    options, prepared = config.model, config.data
    given = {"image_size": options.img_size, "mean": prepared.mean, "std": prepared.std}
    given |= {"interpolation": prepared.interpolation, "crop_ratio": prepared.crop_ratio}
    if training:
        given["drop_path_rate"] = options.drop_path
    if training or pooling:
        given["global_pool"] = options.global_pool
    changes = {key: value for key, value in given.items() if value is not None}
    if "global_pool" in changes:
        changes["fc_norm"] = None  # follows the pooling
    if training and options.name != "auto":
        return named(options.name, **changes)
    if checkpoint is None:
        raise UsageError("model.name=auto builds the model of a checkpoint: give --load_checkpoint")
    if options.name not in ("auto", *PRESETS):  # timm's
        state, recorded = read_checkpoint(checkpoint)
        if not recorded:
            classes = {"num_classes": len(state["head.weight"])} if "head.weight" in state else {}
            return named(options.name, **classes, **changes)
    try:
        return config_of_file(checkpoint, **changes)
    except ValueError as error:
        if options.name == "auto" or "attention heads" not in str(error):
            raise
        return config_of_file(checkpoint, num_heads=named(options.name).num_heads, **changes)


def named(name: str, **changes: Any) -> ViTConfig:
    """The description of one of our models, or of timm's."""
    return preset(name, **changes) if name in PRESETS else timm_models.config_of_architecture(name, **changes)


def config_of_file(path: str | Path, **changes: Any) -> ViTConfig:
    """What to build for the weights of a checkpoint.

    Args:
        path: as in `weights.read_checkpoint`.
        changes: fields of `ViTConfig` to replace, e.g. image_size=384.

    Raises:
        ValueError: an unknown field, or a file that does not tell its number of attention heads.
        CheckpointError: not a Vision Transformer.
    """
    if unknown := changes.keys() - field_names():
        raise ValueError(f"unknown configuration field {', '.join(sorted(unknown))}")
    state, recorded = read_checkpoint(path)
    seen = _shown_by_tensors(path, state)
    known = {key: value for key, value in recorded.items() if key in field_names()}
    if "num_heads" not in known | changes:
        known["num_heads"] = _num_heads(path, seen)
    return ViTConfig(**{**seen, **known, **changes})


def _shown_by_tensors(path: str | Path, state: dict[str, Tensor]) -> dict[str, Any]:
    try:
        width, kernel = state["pos_embed"].shape[-1], state.get("patch_embed.proj.weight")
        patch_size = patch_size_of(state) if kernel is None else kernel.shape[-1]
        depth = 1 + max(int(name.split(".")[1]) for name in state if name.startswith("blocks."))
        hidden, positions = state["blocks.0.mlp.fc1.weight"].shape[0], state["pos_embed"].shape[1]
    except (KeyError, ValueError, IndexError):
        raise checkpoint_file.CheckpointError(f"{path}: holds no weights of a Vision Transformer") from None
    has_head, registers = "head.weight" in state, state["reg_token"].shape[1] if "reg_token" in state else 0
    ratio, prefix = hidden / width, int("cls_token" in state) + registers
    bare = prefix > 0 and math.isqrt(positions) ** 2 == positions  # a square grid, without places for prefix tokens
    return {
        "patch_size": patch_size,
        "stem": "conv" if kernel is None else "patch",
        "embed_dim": width,
        "depth": depth,
        "mlp_ratio": int(ratio) if ratio == int(ratio) else ratio,
        "image_size": math.isqrt(max(positions - (0 if bare else prefix), 1)) * patch_size,
        "num_classes": state["head.weight"].shape[0] if has_head else 1000,
        "global_pool": "token" if "norm.weight" in state and has_head and "cls_token" in state else "avg",
        "fc_norm": "norm.weight" not in state or not has_head,
        "class_token": "cls_token" in state,
        "reg_tokens": registers,
        "no_embed_class": bare,
        "qkv_bias": "blocks.0.attn.qkv.bias" in state,
        "qk_norm": "blocks.0.attn.q_norm.weight" in state,
        "layer_scale": "blocks.0.ls1.gamma" in state,
        "pre_norm": "norm_pre.weight" in state,
    }


def _num_heads(path: str | Path, seen: dict[str, Any]) -> int:
    """No tensor shows the number of heads."""
    sizes = ("patch_size", "embed_dim", "depth")
    for known in PRESETS.values():
        if all(known[name] == seen[name] for name in sizes):
            return known["num_heads"]
    raise ValueError(
        f"{path}: no known model has {', '.join(f'{name} {seen[name]}' for name in sizes)}, so its number of "
        "attention heads is not known: give a configuration, e.g. AutoConfig.from_pretrained(path, num_heads=...)"
    )
