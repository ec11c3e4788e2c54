"""timm's Vision Transformers by name: their sizes and how their pictures are prepared, as a `ViTConfig`."""

from __future__ import annotations

from typing import Any

import timm
import torch
from timm.layers import Mlp
from timm.models.vision_transformer import Block, VisionTransformer
from torch import nn

from vit.model import ViTConfig


def is_known(name: str) -> bool:
    """Whether timm has a model of this name; the tag after the dot, e.g. ".augreg_in21k", is optional."""
    return timm.is_model(name.removeprefix("timm/"))


def config_of_architecture(name: str, pretrained: dict[str, Any] | None = None, **changes: Any) -> ViTConfig:
    """The description of a timm model; nothing is downloaded.

    Args:
        name: e.g. "vit_small_patch16_224.augreg_in21k_ft_in1k", with or without "timm/" before it.
        pretrained: how its weights' pictures are prepared; None = what timm has for the name.
        changes: fields of `ViTConfig` to replace.

    Raises:
        ValueError: no such model, or one of another build than this project's (it says which part).
    """
    name = name.removeprefix("timm/")
    if not timm.is_model(name):
        raise ValueError(f"timm {timm.__version__} has no model {name!r}; timm.list_models('vit_*') lists them")
    with torch.device("meta"):  # shapes only
        model = timm.create_model(name, pretrained=False)
    if reason := _why_not(model):
        raise ValueError(f"timm's {name} {reason}, which this project's model has not")
    block, prepared = model.blocks[0], {**model.pretrained_cfg, **(pretrained or {})}
    hidden = block.mlp.fc1.out_features / model.embed_dim
    fields: dict[str, Any] = {
        "patch_size": model.patch_embed.patch_size[0],
        "embed_dim": model.embed_dim,
        "depth": len(model.blocks),
        "num_heads": block.attn.num_heads,
        "mlp_ratio": int(hidden) if hidden == int(hidden) else hidden,
        "global_pool": model.global_pool,
        "fc_norm": isinstance(model.fc_norm, nn.LayerNorm),
        "image_size": model.patch_embed.img_size[0],
        "num_classes": model.num_classes or 1000,
        "class_token": model.cls_token is not None,
        "reg_tokens": model.num_reg_tokens,
        "no_embed_class": model.no_embed_class,
        "qkv_bias": block.attn.qkv.bias is not None,
        "qk_norm": not isinstance(block.attn.q_norm, nn.Identity),
        "layer_scale": not isinstance(block.ls1, nn.Identity),
        "pre_norm": not isinstance(model.norm_pre, nn.Identity),
        "norm_eps": block.norm1.eps,
        "mean": prepared["mean"],
        "std": prepared["std"],
        "interpolation": prepared["interpolation"],
        "crop_ratio": prepared["crop_pct"],
    }
    return ViTConfig(**{**fields, **changes})


def _why_not(model: nn.Module) -> str:
    """What a timm model has that `vit.model.build` cannot make; "" for nothing."""
    if type(model) is not VisionTransformer:
        return f"is a {type(model).__name__}"
    block, size = model.blocks[0], model.patch_embed.img_size
    if type(block) is not Block:
        return f"has blocks of the kind {type(block).__name__}"
    if type(block.mlp) is not Mlp or not isinstance(block.mlp.act, nn.GELU) or block.mlp.act.approximate != "none":
        return f"has the MLP {type(block.mlp).__name__} with {block.mlp.act}"
    if not isinstance(block.norm1, nn.LayerNorm):
        return f"normalises with {type(block.norm1).__name__}"
    if model.global_pool not in ("avg", "token"):
        return f"pools with {model.global_pool!r}"
    if size[0] != size[1] or model.patch_embed.patch_size[0] != model.patch_embed.patch_size[1]:
        return f"takes pictures of {size} pixels"
    return ""
