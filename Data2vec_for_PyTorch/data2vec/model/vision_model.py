"""data2vec vision: the same student, teacher and targets on a BEiT-style encoder (fairseq data2vec_vision.py).

Parameter names are fairseq's. The block is timm's BEiT block: pre-norm, layer scale, stochastic depth, no bias on keys.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from timm.layers import trunc_normal_
from timm.models import beit
from torch import Tensor, nn

from data2vec.model.attention import attention
from data2vec.model.targets import TargetConfig, average_targets, regression_loss
from data2vec.model.teacher import WithTeacher
from data2vec.model.transformer_block import TransformerBlock


@dataclass(frozen=True)
class VisionConfig:
    """The model's options, named as in fairseq's Data2VecVisionConfig; the last four are ours."""

    image_size: int = 224
    patch_size: int = 16
    in_channels: int = 3
    embed_dim: int = 768
    depth: int = 12
    num_heads: int = 12
    mlp_ratio: float = 4
    layer_scale_init_value: float = 1e-4
    shared_rel_pos_bias: bool = True
    drop_path: float = 0.1
    attention_dropout: float = 0.0
    loss_beta: float = 0.0
    loss_scale: float | None = None
    end_of_block_targets: bool = True
    ema_transformer_only: bool = True
    norm_eps: float = 1e-5
    use_final_proj: bool = True
    init_std: float = 0.02
    checkpoint_activations: bool = False

    @property
    def window(self) -> tuple[int, int]:
        """(rows, columns) of patches."""
        side = self.image_size // self.patch_size
        return side, side


class VisionAttention(beit.Attention):
    """timm's module (names, initialisation) with this project's attention."""

    attend = staticmethod(attention)  # npu_patches and cpu_patches have others

    def forward(self, x: Tensor, shared_rel_pos_bias: Tensor | None = None) -> Tensor:
        """x [B, T, C], bias fp32 [H, T, T] -> [B, T, C]."""
        bias = shared_rel_pos_bias
        if self.relative_position_bias_table is not None:
            bias = self._get_rel_pos_bias()[0]
        qkv = nn.functional.linear(x, self.qkv.weight, torch.cat((self.q_bias, self.k_bias, self.v_bias)))
        q, k, v = qkv.unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)  # 3 x [B, H, T, D]
        y = self.attend(q, k, v, None, self.attn_drop.p if self.training else 0.0, bias)  # [B, H, T, D]
        return self.proj(y.transpose(1, 2).flatten(2))


class VisionBlock(beit.Block, TransformerBlock):
    """timm's BEiT block that also tells its feed-forward branch's output, and can work on some rows only."""

    def __init__(self, config: VisionConfig, drop_path: float):
        norm = partial(nn.LayerNorm, eps=config.norm_eps)
        window = None if config.shared_rel_pos_bias else config.window
        sizes = {"dim": config.embed_dim, "num_heads": config.num_heads, "attn_drop": config.attention_dropout}
        super().__init__(
            **sizes, qkv_bias=True, drop_path=drop_path, init_values=config.layer_scale_init_value, norm_layer=norm
        )
        self.checkpoint_activations = config.checkpoint_activations
        self.attn = VisionAttention(**sizes, qkv_bias=True, window_size=window)
        inner = int(config.embed_dim * config.mlp_ratio)
        self.mlp = nn.Sequential(nn.Linear(config.embed_dim, inner), nn.GELU(), nn.Linear(inner, config.embed_dim))

    def forward(self, x: Tensor, bias: Tensor | None = None, rows: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(x, feed-forward branch): [B, T, C] each, or [N, C] of `rows` (int64 [N], into B * T)."""
        return self.compute(x, bias, rows, *self.branch_weights(x))

    def branch_weights(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """What attention and feed-forward count for every sample: 0, or 1 / (1 - rate). [B, 1, 1] each."""
        ones = x.new_ones(len(x), 1, 1)
        return self.drop_path1(ones), self.drop_path2(ones)

    def compute(
        self, x: Tensor, bias: Tensor | None, rows: Tensor | None, attention: Tensor, feed_forward: Tensor
    ) -> tuple[Tensor, Tensor]:
        """`forward` with the weights of its branches given."""
        length = x.shape[1]
        x = x + attention * self._scaled(self.gamma_1, self.attn(self.norm1(x), bias))
        if rows is not None:
            x = x.flatten(0, 1).index_select(0, rows)  # [N, C]
            feed_forward = feed_forward.flatten().index_select(0, rows // length).unsqueeze(1)  # [N, 1]
        branch = feed_forward * self._scaled(self.gamma_2, self.mlp(self.norm2(x)))
        return x + branch, branch

    @staticmethod
    def _scaled(gamma: Tensor | None, y: Tensor) -> Tensor:
        return y if gamma is None else gamma * y


class VisionEncoder(nn.Module):
    """Blocks over [CLS] and patches; what data2vec's teacher averages."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.rel_pos_bias = beit.RelativePositionBias(config.window, config.num_heads)
        if not config.shared_rel_pos_bias:
            self.rel_pos_bias = None
        rates = torch.linspace(0, config.drop_path, config.depth, device="cpu").tolist()
        self.blocks = nn.ModuleList(VisionBlock(config, rate) for rate in rates)
        self.norm = nn.LayerNorm(config.embed_dim, eps=config.norm_eps)

    def forward(self, x: Tensor, rows: Tensor | None = None) -> Tensor:
        """x [B, T, C] -> normalised [B, T, C], or [N, C] of `rows` (int64 [N], into B * T)."""
        bias = self._bias()
        for block in self.blocks[:-1]:
            x, _ = block.run(x, bias)
        return self.norm(self.blocks[-1].run(x, bias, rows)[0])

    def layer_results(self, x: Tensor, count: int, end_of_block: bool, rows: Tensor | None) -> Iterator[Tensor]:
        """Of the last `count` blocks: the output, or the feed-forward branch; [B, T, C], or [N, C] of `rows`."""
        bias = self._bias()
        last = len(self.blocks) - 1
        for i, block in enumerate(self.blocks):
            x, branch = block(x, bias, rows if i == last else None)
            result = x if end_of_block else branch
            if i > last - count:
                yield result if rows is None or i == last else result.flatten(0, 1).index_select(0, rows)

    def _bias(self) -> Tensor | None:
        return None if self.rel_pos_bias is None else self.rel_pos_bias()  # [H, T, T]


class PatchEmbed(nn.Module):
    """Non-overlapping patches through one linear map."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.conv = nn.Conv2d(config.in_channels, config.embed_dim, config.patch_size, stride=config.patch_size)

    def forward(self, images: Tensor) -> Tensor:
        return self.conv(images).flatten(2).transpose(1, 2)  # [B, 3, S, S] -> [B, P, C]


class Data2VecVision(WithTeacher):
    """The model of one pretraining step on images: student, linear head, teacher, targets and loss."""

    def __init__(self, config: VisionConfig, targets: TargetConfig):
        super().__init__()
        if targets.average_top_k_layers > config.depth:
            raise ValueError(
                f"model.average_top_k_layers={targets.average_top_k_layers}: the encoder has {config.depth} layers"
            )
        self.config = config
        self.targets = targets
        self.patch_embed = PatchEmbed(config)
        self.cls_emb = nn.Parameter(torch.zeros(1, 1, config.embed_dim))
        self.mask_emb = nn.Parameter(torch.zeros(1, 1, config.embed_dim))
        self.encoder = VisionEncoder(config)
        self.final_proj = nn.Linear(config.embed_dim, config.embed_dim)
        self._initialise()

    @torch.no_grad()
    def _initialise(self) -> None:
        """As BEiT and the paper's code: truncated normal everywhere, residual outputs shrunk with depth."""
        std = self.config.init_std
        init = partial(trunc_normal_, std=std, a=-std, b=std)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                init(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        init(self.cls_emb)
        init(self.mask_emb)
        for number, block in enumerate(self.encoder.blocks, 1):
            block.attn.proj.weight.div_(math.sqrt(2.0 * number))
            block.mlp[2].weight.div_(math.sqrt(2.0 * number))

    @property
    def picture_size(self) -> int:
        """Side of a picture."""
        return self.config.image_size

    @property
    def student(self) -> nn.Module:
        return self.encoder if self.config.ema_transformer_only else self

    @property
    def teacher_holder(self) -> WithTeacher:
        return self

    @property
    def copied_to_teacher(self) -> tuple[str, ...]:
        return ()  # with ema_transformer_only the teacher has no patch embedding: it is given the student's

    def forward(self, images: Tensor, mask: Tensor, rows: Tensor) -> dict[str, Any]:
        """One step's loss.

        Args:
            images: normalised, [B, 3, S, S].
            mask: bool [B, P], True at the patches to hide and predict.
            rows: int64 [N], the hidden patches' places in B * (1 + P); made on the host.

        Returns:
            As `Data2VecText.forward`: loss_sum, sample_size N, pred and target fp32 [N, C].
        """
        patches = self.patch_embed(images)  # [B, P, C]
        target = self.make_targets(images, patches, rows)  # [N, C]
        x = torch.where(mask.unsqueeze(2), self.mask_emb.to(patches.dtype), patches)  # [B, P, C]
        x = self.encoder(self.with_cls(x), rows)  # [N, C]
        pred = (self.final_proj(x) if self.config.use_final_proj else x).float()
        scale = self.config.loss_scale
        if scale is None:
            scale = 1 / math.sqrt(pred.shape[-1])
        loss = regression_loss(pred, target, self.config.loss_beta) * (scale if scale > 0 else 1.0)
        return {"loss_sum": loss, "sample_size": len(rows), "pred": pred, "target": target}

    def with_cls(self, patches: Tensor) -> Tensor:
        """[CLS] in front: [B, 1 + P, C]."""
        return torch.cat((self.cls_emb.to(patches.dtype).expand(len(patches), -1, -1), patches), dim=1)

    def encode(self, images: Tensor) -> Tensor:
        """Normalised images [B, 3, S, S] -> final hidden states of [CLS] and patches [B, 1 + P, C]."""
        return self.encoder(self.with_cls(self.patch_embed(images)))

    def patch_states(self, images: Tensor) -> Tensor:
        """Those of the patches alone, [B, P, C]."""
        return self.encode(images)[:, 1:]

    @property
    def patch_size(self) -> int:
        return self.config.patch_size

    def patch_targets(self, images: Tensor) -> Tensor:
        """The teacher's, of all patches: fp32 [B, P, C]."""
        patches = self.patch_embed(images)
        places = torch.arange(len(patches) * (patches.shape[1] + 1), device=images.device)
        rows = places.view(len(patches), -1)[:, 1:].flatten()  # all but [CLS]
        return self.make_targets(images, patches, rows).view_as(patches)

    @torch.no_grad()
    def make_targets(self, images: Tensor, patches: Tensor, rows: Tensor) -> Tensor:
        """The teacher's view of the whole image at the hidden patches: fp32 [N, C]."""
        teacher = self.teacher or self.make_teacher()
        if self.config.ema_transformer_only:
            x = self.with_cls(patches)
        else:
            x, teacher = teacher.with_cls(teacher.patch_embed(images)), teacher.encoder
        whole = self.targets.uses_whole_sequence
        count = self.targets.average_top_k_layers
        results = teacher.layer_results(x, count, self.config.end_of_block_targets, None if whole else rows)
        if not whole:
            return average_targets(results, self.targets)
        target = average_targets((result[:, 1:] for result in results), self.targets)  # [B, P, C]
        length = x.shape[1]
        return target.flatten(0, 1).index_select(0, rows - rows // length - 1)


def build_vision_model(model_config: dict[str, Any]) -> Data2VecVision:
    """The image model of a fairseq `model` config; absent keys take fairseq's defaults.

    Raises:
        ValueError: sizes that do not divide, or more target layers than there are.
    """

    def known(cls: type) -> dict[str, Any]:
        return {key: value for key, value in model_config.items() if key in cls.__dataclass_fields__}

    config = VisionConfig(**known(VisionConfig))
    for key, divisor in (("image_size", "patch_size"), ("embed_dim", "num_heads")):
        if getattr(config, key) % getattr(config, divisor):
            raise ValueError(
                f"model.{key}={getattr(config, key)} is no multiple of model.{divisor}={getattr(config, divisor)}"
            )
    return Data2VecVision(config, TargetConfig(**known(TargetConfig)))
