"""The Vision Transformer: timm's module, set up as MAE fine-tuning has it (facebookresearch/mae models_vit.py)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields
from functools import partial
from typing import Any, Literal

import timm
import torch
import torch.nn.functional as F
from timm.layers import PatchEmbed, trunc_normal_
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from common.device import no_autocast
from vit.model.conv_stem import ConvStem
from vit.model.initialisation import mimic_trained_attention, scale_with_width

HEAD_INIT_STD = 2e-5  # main_finetune.py; a fresh head starts at uniform predictions and does not disturb the encoder
POOLINGS = ("avg", "token")
REFERENCE_FIELDS = ("patch_size", "in_chans", "embed_dim", "depth", "num_heads", "mlp_ratio", "global_pool")
REFERENCE_FIELDS += ("drop_path_rate", "batch_size", "image_size", "num_classes")

INITIALISATIONS: dict[str, Callable[[VisionTransformer], None]] = {
    "timm": lambda model: None,
    "width": scale_with_width,
    "mimetic": mimic_trained_attention,
}
STEMS: dict[str, type[PatchEmbed]] = {"patch": PatchEmbed, "conv": ConvStem}
# fields of ViTConfig
PRESETS: dict[str, dict[str, Any]] = {
    "vit_demo": dict(image_size=48, patch_size=8, embed_dim=96, depth=4, num_heads=3),
    "vit_demo_conv": dict(image_size=48, patch_size=8, embed_dim=64, depth=4, num_heads=4, stem="conv"),
    "vit_small_p16": dict(image_size=224, patch_size=16, embed_dim=384, depth=12, num_heads=6),
    "vit_base_p16": dict(image_size=224, patch_size=16, embed_dim=768, depth=12, num_heads=12),
    "vit_large_p16": dict(image_size=224, patch_size=16, embed_dim=1024, depth=24, num_heads=16),
    "vit_huge_p14": dict(image_size=224, patch_size=14, embed_dim=1280, depth=32, num_heads=16),
}


@dataclass
class ViTConfig:
    """What a model is built from, the one description of it: of a preset, a checkpoint or the user.

    Prints as a dictionary and can be read like one; `dict(config)` gives one. ValueError for sizes that do not fit.

    Attributes:
        mlp_ratio: width of the hidden layer / embed_dim.
        global_pool: "avg" averages the patch tokens and normalises after it, "token" takes the class token.
        fc_norm: whether the norm comes after pooling (`fc_norm`) and not before it (`norm`); None = for "avg".
        stem: "patch" projects patches, "conv" has convolutions in its place.
        drop_path_rate: rises linearly from 0 to this over the blocks.
        class_token, reg_tokens, no_embed_class, qkv_bias, qk_norm, layer_scale, pre_norm, norm_eps: of other ViTs,
            timm's and Hugging Face's; MAE's are the defaults.
        mean, std, interpolation, crop_ratio: of the pictures the model was trained on.
        architecture: name of a timm model that is built otherwise than the fields above can say; "" = as they say.
        batch_size: of the training recipe, per device; nothing is built from it.
    """

    patch_size: int = 16
    in_chans: int = 3
    embed_dim: int = 768
    depth: int = 12
    num_heads: int = 12
    mlp_ratio: float = 4
    global_pool: str = "avg"
    drop_path_rate: float = 0.1
    batch_size: int = 32
    image_size: int = 224
    num_classes: int = 1000
    fc_norm: bool | None = None
    stem: str = "patch"
    class_token: bool = True
    reg_tokens: int = 0
    no_embed_class: bool = False
    qkv_bias: bool = True
    qk_norm: bool = False
    layer_scale: bool = False
    pre_norm: bool = False
    norm_eps: float = 1e-6
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    interpolation: str = "bicubic"
    crop_ratio: float = 224 / 256
    architecture: str = ""

    def __post_init__(self) -> None:
        if self.in_chans != 3:
            raise ValueError(f"in_chans={self.in_chans}: only 3 is supported")
        for name in ("patch_size", "embed_dim", "depth", "num_heads", "image_size", "num_classes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be 1 or more, not {getattr(self, name)}")
        if self.image_size % self.patch_size and not self.architecture:
            raise ValueError(f"image_size {self.image_size} is not a multiple of patch_size {self.patch_size}")
        if self.embed_dim % self.num_heads and not self.architecture:
            raise ValueError(f"embed_dim {self.embed_dim} is not a multiple of num_heads {self.num_heads}")
        if self.global_pool not in POOLINGS and not self.architecture:
            raise ValueError(f"global_pool must be 'avg' or 'token', not {self.global_pool!r}")
        if self.stem not in STEMS:
            raise ValueError(f"stem must be one of {', '.join(STEMS)}, not {self.stem!r}")
        if not 0 <= self.drop_path_rate < 1:
            raise ValueError(f"drop_path_rate must be from 0 to below 1, not {self.drop_path_rate}")
        self.mean, self.std = tuple(self.mean), tuple(self.std)
        if self.fc_norm is None:
            self.fc_norm = self.global_pool == "avg"

    def __getitem__(self, name: str) -> Any:
        return asdict(self)[name]

    def __iter__(self) -> Iterator[str]:
        return iter(asdict(self))

    def keys(self) -> list[str]:
        return list(self)

    def __str__(self) -> str:
        """The reference's fields, and of the others those that are not its."""
        usual = asdict(ViTConfig(global_pool=self.global_pool))
        return str({k: v for k, v in asdict(self).items() if k in REFERENCE_FIELDS or v != usual[k]})

    __repr__ = __str__


def field_names() -> set[str]:
    """Of `ViTConfig`."""
    return {field.name for field in fields(ViTConfig)}


class ClassifyingViT(VisionTransformer):
    """timm's module with its description as `config`, and a classifier that works in fp32.

    Logits of 8 bits would tie: in bf16, 82 of 3,000 pictures have two best classes.
    """

    config: ViTConfig

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        features = super().forward_head(x, pre_logits=True)  # [B, N, D] -> [B, D]
        if pre_logits:
            return features
        wide = torch.promote_types(self.head.weight.dtype, torch.float32)
        with no_autocast(features.device):
            return F.linear(features.to(wide), self.head.weight.to(wide), self.head.bias.to(wide))  # [B, C]


def build(config: ViTConfig, kind: type[ClassifyingViT] = ClassifyingViT, init: str = "timm") -> ClassifyingViT:
    """A model [B, 3, S, S] -> logits [B, C] in training mode with fresh weights; parameters have MAE's names."""
    if init not in INITIALISATIONS:
        raise ValueError(f"init must be one of {', '.join(INITIALISATIONS)}, not {init!r}")
    model = _of_timm(config, kind) if config.architecture else _of_fields(config, kind)
    model.config = config
    INITIALISATIONS[init](model)
    reset_head(model)
    return model


def _of_timm(config: ViTConfig, kind: type[ClassifyingViT]) -> ClassifyingViT:
    """timm's own model, with our head: `kind` only replaces methods of timm's class."""
    sizes = {"img_size": config.image_size, "num_classes": config.num_classes, "global_pool": config.global_pool}
    model = timm.create_model(config.architecture, drop_path_rate=config.drop_path_rate, **sizes)
    model.__class__ = kind
    return model


def _of_fields(config: ViTConfig, kind: type[ClassifyingViT]) -> ClassifyingViT:
    return kind(
        img_size=config.image_size,
        patch_size=config.patch_size,
        embed_dim=config.embed_dim,
        depth=config.depth,
        num_heads=config.num_heads,
        mlp_ratio=config.mlp_ratio,
        num_classes=config.num_classes,
        global_pool=config.global_pool,
        fc_norm=config.fc_norm,
        class_token=config.class_token,
        reg_tokens=config.reg_tokens,
        no_embed_class=config.no_embed_class,
        qkv_bias=config.qkv_bias,
        qk_norm=config.qk_norm,
        init_values=1e-5 if config.layer_scale else None,
        pre_norm=config.pre_norm,
        drop_path_rate=config.drop_path_rate,
        norm_layer=partial(nn.LayerNorm, eps=config.norm_eps),
        act_layer=nn.GELU,
        embed_layer=STEMS[config.stem],
    )


def preset(name: str, **changes: Any) -> ViTConfig:
    """The description of a known model, with fields replaced. ValueError for an unknown name."""
    if name not in PRESETS:
        raise ValueError(f"unknown model {name!r}; known: {', '.join(PRESETS)}")
    return ViTConfig(**{**PRESETS[name], **changes})


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
) -> ClassifyingViT:
    """`build` with the reference's keywords: erf GELU, LayerNorm eps 1e-6, MLP ratio 4.

    ValueError for sizes that do not divide or an unknown pooling.
    """
    return build(
        ViTConfig(
            image_size=img_size,
            patch_size=patch_size,
            embed_dim=embed_dim,
            depth=depth,
            num_heads=num_heads,
            num_classes=num_classes,
            global_pool=global_pool,
            drop_path_rate=drop_path,
            stem=stem,
        ),
        init=init,
    )


def create_model(name: str, num_classes: int = 1000, **overrides: Any) -> ClassifyingViT:
    """`build_model` with the sizes of a named preset; `overrides` replace any of its arguments (e.g. img_size=384)."""
    keywords = {"img_size": "image_size", "drop_path": "drop_path_rate"}
    changes = {keywords.get(key, key): value for key, value in overrides.items()}
    init = changes.pop("init", "timm")
    return build(preset(name, num_classes=num_classes, **{"drop_path_rate": 0.0, **changes}), init=init)


def reset_head(model: VisionTransformer) -> None:
    """Fresh classifier weights, as MAE starts fine-tuning."""
    trunc_normal_(model.head.weight, std=HEAD_INIT_STD)
    nn.init.zeros_(model.head.bias)
