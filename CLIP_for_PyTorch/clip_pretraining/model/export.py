"""The vision tower as others load it: `CLIPVisionModelWithProjection`, or open_clip's `visual.*` tensors."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection, PreTrainedModel

from clip_pretraining.model.loading import ImageSettings
from common.errors import UsageError

_OPEN_CLIP_BLOCK = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "self_attn.out_proj": "attn.out_proj",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}


def to_transformers(model: PreTrainedModel, settings: ImageSettings, folder: Path) -> str:
    """A folder for `CLIPVisionModelWithProjection.from_pretrained`; its `image_embeds` are our image features."""
    values = {**_vision_config(model).to_dict(), "projection_dim": model.config.projection_dim}
    config = CLIPVisionConfig.from_dict(values)
    tower = CLIPVisionModelWithProjection(config)
    tower.vision_model.load_state_dict(model.vision_model.state_dict())
    tower.visual_projection.load_state_dict(model.visual_projection.state_dict())
    tower.save_pretrained(folder)
    CLIPImageProcessor(
        size={"shortest_edge": settings.size},
        crop_size={"height": settings.size, "width": settings.size},
        image_mean=list(settings.mean),
        image_std=list(settings.std),
    ).save_pretrained(folder)
    return f"{folder}: load with transformers.CLIPVisionModelWithProjection.from_pretrained"


def to_open_clip(model: PreTrainedModel, settings: ImageSettings, folder: Path) -> str:
    """`visual.safetensors` with open_clip's names, and the `vision_cfg` to build the tower with."""
    config = _vision_config(model)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(open_clip_visual(model), folder / "visual.safetensors")
    vision_cfg = {
        "embed_dim": model.config.projection_dim,
        "quick_gelu": config.hidden_act == "quick_gelu",
        "vision_cfg": {
            "image_size": config.image_size,
            "layers": config.num_hidden_layers,
            "width": config.hidden_size,
            "head_width": config.hidden_size // config.num_attention_heads,
            "patch_size": config.patch_size,
            "mlp_ratio": config.intermediate_size / config.hidden_size,
        },
        "preprocess_cfg": {"mean": list(settings.mean), "std": list(settings.std)},
    }
    (folder / "open_clip_config.json").write_text(json.dumps(vision_cfg, indent=2))
    return f"{folder}: load visual.safetensors into the `visual` part of an open_clip model of that configuration"


def open_clip_visual(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """The tower's tensors under open_clip's names (`visual.` left off)."""
    _vision_config(model)
    source = model.vision_model.state_dict()
    target = {
        "conv1.weight": source["embeddings.patch_embedding.weight"],
        "class_embedding": source["embeddings.class_embedding"],
        "positional_embedding": source["embeddings.position_embedding.weight"],
        "proj": model.visual_projection.weight.T.contiguous(),
    }
    for part in ("weight", "bias"):
        target[f"ln_pre.{part}"] = source[f"pre_layrnorm.{part}"]  # sic: transformers' spelling
        target[f"ln_post.{part}"] = source[f"post_layernorm.{part}"]
        for layer in range(model.config.vision_config.num_hidden_layers):
            ours, theirs = f"encoder.layers.{layer}", f"transformer.resblocks.{layer}"
            for old, new in _OPEN_CLIP_BLOCK.items():
                target[f"{theirs}.{new}.{part}"] = source[f"{ours}.{old}.{part}"]
            qkv = [source[f"{ours}.self_attn.{name}_proj.{part}"] for name in "qkv"]
            target[f"{theirs}.attn.in_proj_{part}"] = torch.cat(qkv)
    return {key: value.detach().clone() for key, value in target.items()}


def _vision_config(model: PreTrainedModel) -> CLIPVisionConfig:
    config = model.config.vision_config
    if not isinstance(config, CLIPVisionConfig):
        raise UsageError(f"only CLIP vision towers can be exported, this is a {config.model_type!r}")
    return config
