"""Model folders of the hubs: timm's and Hugging Face's names and configurations, to and from ours (MAE's and timm's).

A folder has `model.safetensors` (or `pytorch_model.bin`) and `config.json`. timm's says which architecture it is and
how pictures are prepared; a Hugging Face ViT has sizes, class names and a `preprocessor_config.json`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from common.checkpoint_file import CheckpointError
from common.run.new_file import readable
from vit.model.timm_models import config_of_architecture
from vit.model.vision_transformer import ClassifyingViT, ViTConfig

WEIGHTS, CONFIG, PREPROCESSING = "model.safetensors", "config.json", "preprocessor_config.json"
MODEL_FILES = (WEIGHTS, "pytorch_model.bin")
RESAMPLING = {0: "nearest", 2: "bilinear", 3: "bicubic"}  # Pillow's numbers

# Hugging Face name -> ours; query, key and value are joined beside it
_RENAMES = [
    (r"^vit\.", ""),
    (r"^classifier\.", "head."),
    (r"^embeddings\.cls_token$", "cls_token"),
    (r"^embeddings\.position_embeddings$", "pos_embed"),
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^encoder\.layer\.(\d+)\.", r"blocks.\1."),
    (r"^layernorm\.", "norm."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"\.attention\.output\.dense\.", ".attn.proj."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"\.output\.dense\.", ".mlp.fc2."),
]
_BACK_RENAMES = [
    (r"^head\.", "classifier."),
    (r"^cls_token$", "vit.embeddings.cls_token"),
    (r"^pos_embed$", "vit.embeddings.position_embeddings"),
    (r"^patch_embed\.proj\.", "vit.embeddings.patch_embeddings.projection."),
    (r"^norm\.", "vit.layernorm."),
    (r"^blocks\.(\d+)\.", r"vit.encoder.layer.\1."),
    (r"\.norm1\.", ".layernorm_before."),
    (r"\.norm2\.", ".layernorm_after."),
    (r"\.attn\.proj\.", ".attention.output.dense."),
    (r"\.mlp\.fc1\.", ".intermediate.dense."),
    (r"\.mlp\.fc2\.", ".output.dense."),
]


def _rename(name: str, rules: list[tuple[str, str]]) -> str:
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name


def is_hugging_face(state: dict[str, Tensor]) -> bool:
    return any(name.removeprefix("vit.").startswith("embeddings.patch_embeddings.") for name in state)


def from_hugging_face(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights of transformers' ViT by our names: query, key and value joined; without the pooler, unused here."""
    ours: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if "pooler." in name:
            continue
        if found := re.match(r"(.*\.attention\.)attention\.(query|key|value)\.(weight|bias)$", name):
            if found[2] == "query":
                parts = [state[f"{found[1]}attention.{part}.{found[3]}"] for part in ("query", "key", "value")]
                block = _rename(found[1].removesuffix("attention."), _RENAMES)
                ours[f"{block}attn.qkv.{found[3]}"] = torch.cat(parts)
            continue
        ours[_rename(name, _RENAMES)] = tensor
    return ours


def to_hugging_face(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our weights by the names of transformers' `ViTForImageClassification`.

    ValueError for an average-pooled model: transformers' ViT classifies the class token only.
    """
    if "fc_norm.weight" in state:
        raise ValueError(
            "Hugging Face's ViT classifies the class token, this model averages the patches: it cannot be written so; "
            "--to timm keeps it, and transformers reads that through TimmWrapperForImageClassification"
        )
    theirs: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if found := re.match(r"blocks\.(\d+)\.attn\.qkv\.(weight|bias)$", name):
            for part, rows in zip(("query", "key", "value"), tensor.chunk(3), strict=True):
                theirs[f"vit.encoder.layer.{found[1]}.attention.attention.{part}.{found[2]}"] = rows.contiguous()
            continue
        theirs[_rename(name, _BACK_RENAMES)] = tensor
    return theirs


def read_config(folder: Path) -> dict[str, Any]:
    """`config.json` of a folder; empty where there is none. CheckpointError where it is no JSON object."""
    return _read_json(folder / CONFIG)


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: must be a JSON object")
    return content


def recorded(folder: Path) -> dict[str, Any]:
    """Fields of `ViTConfig` that a folder's files tell.

    Raises:
        CheckpointError: a configuration of something that is no Vision Transformer of this kind.
    """
    content = read_config(folder)
    try:
        if "vit_config" in content:  # our own: `save_pretrained`
            return dict(content["vit_config"])
        if "architecture" in content:
            return _of_timm(content)
        if content.get("model_type") == "vit":
            return _of_hugging_face(content, _read_json(folder / PREPROCESSING))
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{folder / CONFIG}: {error}") from None
    return {}


def _of_timm(content: dict[str, Any]) -> dict[str, Any]:
    changes = {key: content[key] for key in ("num_classes", "global_pool") if content.get(key)}  # DINO's has 0 classes
    arguments = content.get("model_args")
    return dict(config_of_architecture(content["architecture"], content.get("pretrained_cfg"), arguments, **changes))


def _of_hugging_face(content: dict[str, Any], preprocessing: dict[str, Any]) -> dict[str, Any]:
    if content.get("hidden_act", "gelu") != "gelu":
        raise ValueError(f"hidden_act {content['hidden_act']}: only gelu is supported")
    size, crop = preprocessing.get("size", {}), preprocessing.get("crop_size", {})
    cropped = preprocessing.get("do_center_crop") and "shortest_edge" in size
    fields: dict[str, Any] = {
        "num_heads": content["num_attention_heads"],
        "norm_eps": content.get("layer_norm_eps", 1e-12),
        "image_size": content["image_size"],
        "global_pool": "token",
        "fc_norm": False,
        "mean": preprocessing.get("image_mean", (0.5, 0.5, 0.5)),
        "std": preprocessing.get("image_std", (0.5, 0.5, 0.5)),
        "interpolation": RESAMPLING[preprocessing.get("resample", 2)],
        # its usual image processor resizes to the square
        "crop_ratio": crop["height"] / size["shortest_edge"] if cropped else 1.0,
    }
    return fields


def labels(folder: Path) -> list[str] | None:
    """Class names that a folder's configuration has, in class order; None where it has none."""
    content = read_config(folder)
    if names := content.get("label_names"):
        return list(names)
    if names := content.get("id2label"):
        listed = [str(names[key]) for key in sorted(names, key=int)]
        return None if listed == [f"LABEL_{i}" for i in range(len(listed))] else listed
    return None


def save_pretrained(model: ClassifyingViT, folder: str | Path, class_names: Sequence[str] | None = None) -> Path:
    """Writes a model as a folder that `AutoModel`, timm (`local-dir:`) and transformers' TimmWrapper read.

    Raises:
        FileExistsError: the folder has a model already.
    """
    folder = Path(folder)
    if (folder / WEIGHTS).exists():
        raise FileExistsError(f"{folder / WEIGHTS} exists and is not overwritten")
    folder.mkdir(parents=True, exist_ok=True)
    config = model.config
    content: dict[str, Any] = {
        "architecture": config.architecture or "vit_base_patch16_224",  # the family; the sizes are in model_args
        "num_classes": config.num_classes,
        "global_pool": config.global_pool,
        "model_args": _timm_arguments(config),
        "pretrained_cfg": {
            "input_size": [3, config.image_size, config.image_size],
            "fixed_input_size": True,
            "num_classes": config.num_classes,
            "mean": list(config.mean),
            "std": list(config.std),
            "interpolation": config.interpolation,
            "crop_pct": config.crop_ratio,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        },
        "vit_config": dict(config),
    }
    if class_names is not None:
        content["label_names"] = list(class_names)
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    safetensors.torch.save_file(state, folder / WEIGHTS, metadata={"format": "pt"})
    readable(folder)
    text = json.dumps(content, ensure_ascii=False, indent=1)
    (folder / CONFIG).write_text(text + "\n", encoding="utf-8")
    return folder


def _timm_arguments(config: ViTConfig) -> dict[str, Any]:
    """What `timm.create_model` needs beside the architecture."""
    if config.architecture:
        return {"img_size": config.image_size}
    same = ("patch_size", "embed_dim", "depth", "num_heads", "mlp_ratio", "fc_norm", "class_token", "reg_tokens")
    same += ("global_pool", "qkv_bias", "qk_norm", "pre_norm", "no_embed_class")
    arguments = {"img_size": config.image_size, **{name: config[name] for name in same}}
    if config.layer_scale:
        arguments["init_values"] = 1e-5
    return arguments
