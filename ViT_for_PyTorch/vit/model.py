"""The Vision Transformer: timm's module, set up as MAE fine-tuning has it (facebookresearch/mae models_vit.py)."""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from timm.layers import PatchEmbed, trunc_normal_
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from common.cpu import cpu_kernels
from vit.conv_stem import ConvStem
from vit.initialisation import mimic_trained_attention, scale_with_width

HEAD_INIT_STD = 2e-5  # main_finetune.py; a fresh head starts at uniform predictions and does not disturb the encoder

INITIALISATIONS: dict[str, Callable[[VisionTransformer], None]] = {
    "timm": lambda model: None,
    "width": scale_with_width,
    "mimetic": mimic_trained_attention,
}
STEMS: dict[str, type[PatchEmbed]] = {"patch": PatchEmbed, "conv": ConvStem}
# arguments of build_model
PRESETS: dict[str, dict[str, Any]] = {
    "vit_demo": dict(img_size=48, patch_size=8, embed_dim=96, depth=4, num_heads=3),
    "vit_demo_conv": dict(img_size=48, patch_size=8, embed_dim=64, depth=4, num_heads=4, stem="conv"),
    "vit_small_p16": dict(img_size=224, patch_size=16, embed_dim=384, depth=12, num_heads=6),
    "vit_base_p16": dict(img_size=224, patch_size=16, embed_dim=768, depth=12, num_heads=12),
    "vit_large_p16": dict(img_size=224, patch_size=16, embed_dim=1024, depth=24, num_heads=16),
    "vit_huge_p14": dict(img_size=224, patch_size=14, embed_dim=1280, depth=32, num_heads=16),
}


class VitBlock(Block):
    """timm's block; on the CPU with `cpu_kernels`, and with a branch skipped for the pictures that drop it.

    Stochastic depth has the same distribution and the kept pictures the same numbers, for less work: on average by the
    drop rate. On accelerators and under torch.compile, where batch sizes that change cost more than they save, this is
    timm's block.
    """

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        if not x.is_cpu or torch.compiler.is_compiling():
            return super().forward(x, attn_mask, is_causal)
        with cpu_kernels():
            x = _add_branch(x, lambda kept: self.attn(self.norm1(kept), attn_mask, is_causal), self.drop_path1)
            return _add_branch(x, lambda kept: self.mlp(self.norm2(kept)), self.drop_path2)  # [B, N, C]


def _add_branch(x: Tensor, branch: Callable[[Tensor], Tensor], drop_path: nn.Module) -> Tensor:
    """x + branch(x) [B, N, C] with stochastic depth per picture; draws one number per picture where it applies."""
    rate = getattr(drop_path, "drop_prob", 0.0)
    if rate == 0.0 or not drop_path.training:
        return x + branch(x)
    kept = (torch.rand(len(x)) >= rate).nonzero().squeeze(1)  # indices of pictures
    scale = 1.0 / (1.0 - rate)
    if 0 < len(kept) < len(x):
        return x.index_add(0, kept, branch(x.index_select(0, kept)).to(x.dtype), alpha=scale)
    # with none kept the branch stays in the graph: every rank must have a gradient for every weight
    return x.add(branch(x), alpha=scale if len(kept) else 0.0)


def model_names() -> list[str]:
    """The names `create_model` knows."""
    return list(PRESETS)


def build_model(
    img_size: int,
    patch_size: int,
    embed_dim: int,
    depth: int,
    num_heads: int,
    num_classes: int,
    global_pool: Literal["avg", "token"] = "avg",
    drop_path: float = 0.0,
    init: Literal["timm", "width", "mimetic"] = "timm",
    stem: Literal["patch", "conv"] = "patch",
) -> VisionTransformer:
    """A ViT classifier [B, 3, img_size, img_size] -> logits [B, num_classes] with MAE's parameter names.

    `global_pool="avg"` averages the patch tokens and normalises after it (`fc_norm`); "token" normalises the sequence
    (`norm`) and takes the class token. LayerNorm eps 1e-6, erf GELU, MLP ratio 4, `drop_path` rising linearly from 0 to
    the given rate over the blocks. ValueError for sizes that do not divide or an unknown pooling.
    """
    if img_size % patch_size:
        raise ValueError(f"img_size {img_size} is not a multiple of patch_size {patch_size}")
    if embed_dim % num_heads:
        raise ValueError(f"embed_dim {embed_dim} is not a multiple of num_heads {num_heads}")
    if num_classes < 1:
        raise ValueError(f"num_classes must be 1 or more, not {num_classes}")
    if global_pool not in ("avg", "token"):
        raise ValueError(f"global_pool must be 'avg' or 'token', not {global_pool!r}")
    if stem not in STEMS:
        raise ValueError(f"stem must be one of {', '.join(STEMS)}, not {stem!r}")
    if init not in INITIALISATIONS:
        raise ValueError(f"init must be one of {', '.join(INITIALISATIONS)}, not {init!r}")
    model = VisionTransformer(
        img_size=img_size,
        patch_size=patch_size,
        embed_dim=embed_dim,
        depth=depth,
        num_heads=num_heads,
        num_classes=num_classes,
        global_pool=global_pool,
        fc_norm=global_pool == "avg",
        drop_path_rate=drop_path,
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
        act_layer=nn.GELU,
        block_fn=VitBlock,
        embed_layer=STEMS[stem],
    )
    INITIALISATIONS[init](model)
    reset_head(model)
    return model


def reset_head(model: VisionTransformer) -> None:
    """Fresh classifier weights, as MAE starts fine-tuning."""
    trunc_normal_(model.head.weight, std=HEAD_INIT_STD)
    nn.init.zeros_(model.head.bias)


def create_model(name: str, num_classes: int = 1000, **overrides: Any) -> VisionTransformer:
    """`build_model` with the sizes of a named preset; `overrides` replace any of its arguments (e.g. img_size=384).

    ValueError for an unknown name, listing the known ones.
    """
    if name not in PRESETS:
        raise ValueError(f"unknown model {name!r}; known: {', '.join(PRESETS)}")
    return build_model(**{**PRESETS[name], "num_classes": num_classes, **overrides})
