"""Models for other programs: a folder of timm's or of Hugging Face's, or an ONNX file."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from common.errors import UsageError
from common.model import onnx_file
from common.run.new_file import readable
from vit.model.vision_transformer import ClassifyingViT, ViTConfig
from vit.weights.hub_files import CONFIG, PREPROCESSING, RESAMPLING, WEIGHTS, save_pretrained, to_hugging_face


def write_timm(model: ClassifyingViT, folder: Path, class_names: Sequence[str] | None) -> None:
    """A folder that `timm.create_model("local-dir:FOLDER", pretrained=True)` and transformers' TimmWrapper read.

    Raises:
        ValueError: timm has no such model.
    """
    if model.config.stem != "patch":
        raise ValueError(f"timm's Vision Transformer has no stem of the kind {model.config.stem!r}: use --to onnx")
    save_pretrained(model, folder, class_names)


def write_hugging_face(model: ClassifyingViT, folder: Path, class_names: Sequence[str] | None) -> None:
    """A folder that transformers' `ViTForImageClassification` and `AutoImageProcessor` read.

    Raises:
        ValueError: transformers' ViT is not built so; the message says in what.
    """
    config = model.config
    if problem := _not_of_hugging_face(config):
        raise ValueError(
            f"Hugging Face's ViT has no {problem}: --to timm keeps it, and transformers' TimmWrapper reads that"
        )
    state = to_hugging_face({name: tensor.detach().cpu() for name, tensor in model.state_dict().items()})
    names = list(class_names) if class_names else [f"LABEL_{index}" for index in range(config.num_classes)]
    folder.mkdir(parents=True, exist_ok=True)
    safetensors.torch.save_file(
        {name: tensor.contiguous() for name, tensor in state.items()}, folder / WEIGHTS, metadata={"format": "pt"}
    )
    readable(folder)
    described = {
        "model_type": "vit",
        "architectures": ["ViTForImageClassification"],
        "hidden_size": config.embed_dim,
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.num_heads,
        "intermediate_size": int(config.embed_dim * config.mlp_ratio),
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "layer_norm_eps": config.norm_eps,
        "image_size": config.image_size,
        "patch_size": config.patch_size,
        "num_channels": 3,
        "qkv_bias": config.qkv_bias,
        "id2label": dict(enumerate(names)),
        "label2id": {name: index for index, name in enumerate(names)},
    }
    prepared = {
        "image_processor_type": "CLIPImageProcessor",  # the one that crops, as evaluation does here
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": round(config.image_size / config.crop_ratio)},
        "resample": {name: number for number, name in RESAMPLING.items()}[config.interpolation],
        "do_center_crop": True,
        "crop_size": {"height": config.image_size, "width": config.image_size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(config.mean),
        "image_std": list(config.std),
    }
    _write_json(folder / CONFIG, described)
    _write_json(folder / PREPROCESSING, prepared)


def _not_of_hugging_face(config: ViTConfig) -> str:
    """What of a model transformers' ViT cannot have; "" for nothing."""
    if config.architecture:
        return f"architecture like timm's {config.architecture}"
    usual = asdict(ViTConfig(global_pool="token", fc_norm=False))
    parts = ("global_pool", "fc_norm", "stem", "class_token", "reg_tokens", "no_embed_class", "qk_norm", "layer_scale")
    own = asdict(config)
    return ", ".join(f"{name}={own[name]}" for name in (*parts, "pre_norm") if own[name] != usual[name])


def write_onnx(model: ClassifyingViT, path: Path, class_names: Sequence[str] | None) -> None:
    """An ONNX file: `images` float32 [batch, 3, S, S], normalised, to `logits` [batch, C]; any batch size.

    How pictures are prepared, and the class names, are in its metadata under "vit_config" and "class_names".

    Raises:
        UsageError: onnx or onnxscript is not installed.
    """
    size = model.config.image_size
    told = {"vit_config": dict(model.config), "class_names": list(class_names) if class_names else None}
    dims = ({0: torch.export.Dim("batch")},)
    onnx_file.write(model, {"images": torch.zeros(2, 3, size, size)}, "logits", dims, told, path)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


WRITERS = {"timm": write_timm, "huggingface": write_hugging_face, "onnx": write_onnx}


def write(kind: str, model: ClassifyingViT, path: Path, class_names: Sequence[str] | None) -> None:
    """The file or folder `path`, of a kind of WRITERS: whole, or nothing at all where writing fails.

    Raises:
        UsageError: something of that name is there.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
        WRITERS[kind](model, Path(folder) / path.name, class_names)
        made = sorted(Path(folder).iterdir(), key=lambda item: item.name == path.name)  # what was asked for is last
        for target in [path.parent / item.name for item in made]:
            if target.exists():
                raise UsageError(f"{target} exists and is not overwritten; move it away or choose another name")
        for item in made:
            os.replace(item, path.parent / item.name)
