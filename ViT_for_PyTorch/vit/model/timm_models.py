"""timm's Vision Transformers by name: their sizes and how their pictures are prepared, as a `ViTConfig`."""

from __future__ import annotations

from typing import Any

import timm
import torch
from timm.layers import Mlp
from timm.models.vision_transformer import Attention, Block, VisionTransformer
from torch import nn

from vit.model.vision_transformer import POOLINGS, ViTConfig, build

_OF_ANY = ("img_size", "in_chans", "num_classes", "global_pool")  # arguments that change no block


def is_known(name: str) -> bool:
    """Whether timm has a model of this name; the tag after the dot, e.g. ".augreg_in21k", is optional."""
    return timm.is_model(name.removeprefix("timm/"))


def config_of_architecture(
    name: str, pretrained: dict[str, Any] | None = None, arguments: dict[str, Any] | None = None, **changes: Any
) -> ViTConfig:
    """The description of a timm model; nothing is downloaded.

    Args:
        name: e.g. "vit_small_patch16_224.augreg_in21k_ft_in1k", with or without "timm/" before it.
        pretrained: how its weights' pictures are prepared; None = what timm has for the name.
        arguments: of `timm.create_model` beside the name; only where fields of `ViTConfig` can say what they do.
        changes: fields of `ViTConfig` to replace.

    Raises:
        ValueError: no such model, or none of timm's VisionTransformer.
    """
    name = name.removeprefix("timm/")
    if not timm.is_model(name):
        raise ValueError(f"timm {timm.__version__} has no model {name!r}; timm.list_models('vit_*') lists them")
    with torch.device("meta"):  # shapes only
        model = timm.create_model(name, pretrained=False, **(arguments or {}))
        if type(model) is not VisionTransformer:
            raise ValueError(f"timm's {name} is a {type(model).__name__}, not a VisionTransformer")
        size, patch = model.patch_embed.img_size, model.patch_embed.patch_size
        if size[0] != size[1] or patch[0] != patch[1]:
            raise ValueError(f"timm's {name} takes pictures of {size} pixels in patches of {patch}: only squares here")
        fields = _common_fields(model, pretrained or {})
        plain = _plain_fields(model)
        if plain is not None and _shapes(build(ViTConfig(**fields, **plain))) == _shapes(model):
            fields |= plain
        elif other := {key: value for key, value in (arguments or {}).items() if key not in _OF_ANY}:
            raise ValueError(f"timm's {name} with {other} is not supported here, only as timm has it by name")
        else:
            fields["architecture"] = name
    return ViTConfig(**{**fields, **changes})


def _shapes(model: nn.Module) -> dict[str, torch.Size]:
    """Of all parameters but the head's, which a timm model without classes lacks."""
    return {name: tensor.shape for name, tensor in model.state_dict().items() if not name.startswith("head.")}


def _common_fields(model: VisionTransformer, pretrained: dict[str, Any]) -> dict[str, Any]:
    prepared = {**model.pretrained_cfg, **pretrained}
    return {
        "patch_size": model.patch_embed.patch_size[0],
        "embed_dim": model.embed_dim,
        "depth": len(model.blocks),
        "global_pool": model.global_pool,
        "fc_norm": isinstance(model.fc_norm, nn.LayerNorm),
        "image_size": model.patch_embed.img_size[0],
        "num_classes": model.num_classes or 1000,
        "class_token": model.cls_token is not None,
        "reg_tokens": model.num_reg_tokens,
        "no_embed_class": model.no_embed_class,
        "mean": prepared["mean"],
        "std": prepared["std"],
        "interpolation": prepared["interpolation"],
        "crop_ratio": prepared["crop_pct"],
    }


def _plain_fields(model: VisionTransformer) -> dict[str, Any] | None:
    """What a block of our own kind is built from; None where the model's blocks, norms or pooling are of another."""
    block = model.blocks[0]
    of_our_kind = (
        model.global_pool in POOLINGS
        and type(block) is Block
        and type(block.attn) is Attention
        and type(block.mlp) is Mlp
        and isinstance(block.mlp.act, nn.GELU)
        and block.mlp.act.approximate == "none"
        and isinstance(block.norm1, nn.LayerNorm)
    )
    if not of_our_kind:
        return None
    hidden = block.mlp.fc1.out_features / model.embed_dim
    return {
        "num_heads": block.attn.num_heads,
        "mlp_ratio": int(hidden) if hidden == int(hidden) else hidden,
        "qkv_bias": block.attn.qkv.bias is not None,
        "qk_norm": not isinstance(block.attn.q_norm, nn.Identity),
        "layer_scale": not isinstance(block.ls1, nn.Identity),
        "pre_norm": not isinstance(model.norm_pre, nn.Identity),
        "norm_eps": block.norm1.eps,
    }
