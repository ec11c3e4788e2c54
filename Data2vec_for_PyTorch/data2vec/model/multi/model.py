"""data2vec 2.0: visible tokens -> student -> decoder -> the teacher's targets at hidden tokens (fairseq data2vec2.py).

Parameter names are fairseq's: released checkpoints load.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from data2vec.model.encoder import init_bert_weights
from data2vec.model.multi.block import BlockConfig, stack
from data2vec.model.multi.decoder import DecoderConfig
from data2vec.model.multi.mask_plan import MaskPlan
from data2vec.model.multi.modality_encoder import ImageEncoder, ModalityConfig, ModalityEncoder, TextEncoder
from data2vec.model.targets import TargetConfig, average_targets, regression_loss
from data2vec.model.teacher import WithTeacher


@dataclass(frozen=True)
class MultiConfig:
    """The model's options, named as in fairseq's Data2VecMultiConfig; the last one is ours."""

    depth: int = 8
    start_drop_path_rate: float = 0.0
    end_drop_path_rate: float = 0.0
    dropout_input: float = 0.0
    loss_beta: float = 0.0
    loss_scale: float | None = None
    d2v_loss: float = 1.0
    cls_loss: float = 0.0
    ema_encoder_only: bool = True
    init_std: float = 0.02


class Data2VecMulti(WithTeacher):
    """The model of one pretraining step, on text (with `vocab_size`) or on pictures (without)."""

    def __init__(
        self,
        config: MultiConfig,
        targets: TargetConfig,
        block: BlockConfig,
        modality: ModalityConfig,
        vocab_size: int | None = None,
    ):
        super().__init__()
        self.config, self.targets, self.block = config, targets, block
        encoder = ImageEncoder(modality, block) if vocab_size is None else TextEncoder(modality, block, vocab_size)
        self.modality_encoders = nn.ModuleDict({"IMAGE" if vocab_size is None else "TEXT": encoder})
        self.dropout_input = nn.Dropout(config.dropout_input)
        self.blocks = stack(block, config.depth, config.start_drop_path_rate, config.end_drop_path_rate)
        self.norm = block.norm() if block.layer_norm_first else None
        self._initialise()

    def _initialise(self) -> None:
        """BERT's; patches like a linear map, the decoder's convolutions (of pictures its projection, too) torch's."""
        self.apply(partial(init_bert_weights, std=self.config.init_std))
        if isinstance(self.modality, ImageEncoder):
            nn.init.xavier_uniform_(self.modality.local_encoder.proj.weight.detach().flatten(1))
            self.modality.decoder.proj.reset_parameters()

    @property
    def modality(self) -> ModalityEncoder:
        return next(iter(self.modality_encoders.values()))

    @property
    def picture_size(self) -> int | None:
        """Side of a picture; None of text."""
        return self.modality.config.input_size if isinstance(self.modality, ImageEncoder) else None

    @property
    def student(self) -> nn.Module:
        return self.blocks if self.config.ema_encoder_only else self

    @property
    def teacher_holder(self) -> WithTeacher:
        return self

    @property
    def copied_to_teacher(self) -> tuple[str, ...]:
        return ()  # what the teacher lacks it is given by the student: local features, or all before the blocks

    def make_teacher(self) -> nn.Module:
        """A copy of the student, without a decoder and, unless `ema_local_encoder`, without a local encoder."""
        teacher = super().make_teacher()
        if not self.config.ema_encoder_only:
            teacher.modality.decoder = None
            if not self.modality.config.ema_local_encoder:
                teacher.modality.local_encoder = None
        return teacher

    def forward(self, source: Tensor, plan: MaskPlan, has_padding: bool = False) -> dict[str, Any]:
        """One step's loss.

        Args:
            source: token ids int64 [B, T], not masked, or normalised pictures [B, 3, S, S].
            plan: of M masks a sample, `plan_masks`.
            has_padding: whether any row of text is padded.

        Returns:
            As `Data2VecText.forward`: loss_sum (with the [CLS] loss in it), sample_size N, pred and target fp32 [N, C].
        """
        features, real = self.modality.local_features(source, has_padding)  # [B, T, C]
        target = self.make_targets(source, features, real)  # fp32 [B, T, C]
        x = self._encode(*self.modality.contextualize(features, None, plan))  # [B * M, E + K, C]
        hidden = self.modality.decoder_states(x, real, plan, features.shape[1])[-1]  # [N, D]
        pred = self.modality.decoder.proj(hidden).float()  # [N, C]
        expected = target.flatten(0, 1).index_select(0, plan.target)  # [N, C]
        loss = self.config.d2v_loss * self._distance(pred, expected)
        if self.config.cls_loss > 0:
            first = x[:, self.modality.config.num_extra_tokens - 1].float()  # [B * M, C]
            mean = _mean_over_tokens(target, real).repeat_interleave(plan.masks, dim=0)
            # times the number of hidden tokens, by which an update divides: a sum over the batch, as the reference has
            loss = loss + self.config.cls_loss * len(pred) * self._distance(first, mean)
        return {"loss_sum": loss, "sample_size": len(pred), "pred": pred, "target": expected}

    def decoder_states(self, source: Tensor, plan: MaskPlan, has_padding: bool = False) -> list[Tensor]:
        """Of each decoder layer, at hidden tokens: [N, D] each."""
        features, real = self.modality.local_features(source, has_padding)
        x = self._encode(*self.modality.contextualize(features, None, plan))
        return self.modality.decoder_states(x, real, plan, features.shape[1])

    def encode(self, source: Tensor, has_padding: bool = False) -> Tensor:
        """States of whole samples, without the extra tokens: [B, T, C]."""
        features, real = self.modality.local_features(source, has_padding)
        x = self._encode(*self.modality.contextualize(features, real, None))
        return x[:, self.modality.config.num_extra_tokens :]

    def patch_states(self, images: Tensor) -> Tensor:
        """Normalised pictures [B, 3, S, S] -> patches' states [B, P, C]."""
        return self.encode(images)

    @property
    def patch_size(self) -> int:
        return self.modality.config.patch_size

    def patch_targets(self, images: Tensor) -> Tensor:
        """The teacher's, of all patches: fp32 [B, P, C]."""
        return self.make_targets(images, self.modality.local_features(images)[0], None)

    def _encode(self, x: Tensor, key_mask: Tensor | None) -> Tensor:
        x = self.dropout_input(x)
        for block in self.blocks:
            x, _ = block.run(x, key_mask)
        return x if self.norm is None else self.norm(x)

    @torch.no_grad()
    def make_targets(self, source: Tensor, features: Tensor, real: Tensor | None) -> Tensor:
        """The teacher's view of whole samples: the mean of its top layers, normalised, fp32 [B, T, C]."""
        teacher = self.teacher or self.make_teacher()
        if self.config.ema_encoder_only:
            blocks, modality, features = teacher, self.modality, features.detach()
        else:
            blocks, modality = teacher.blocks, teacher.modality
            if modality.local_encoder is not None:
                features, _ = modality.local_features(source, real is not None)
        x, key_mask = modality.contextualize(features, real, None)
        first = len(blocks) - self.targets.average_top_k_layers
        results = []
        for i, block in enumerate(blocks):
            x, result = block(x, key_mask)
            if i >= first:
                results.append(result[:, self.modality.config.num_extra_tokens :])
        return average_targets(results, self.targets, real)

    def _distance(self, pred: Tensor, target: Tensor) -> Tensor:
        scale = self.config.loss_scale
        scale = 1 / math.sqrt(pred.shape[-1]) if scale is None else scale
        return regression_loss(pred, target, self.config.loss_beta) * scale


def _mean_over_tokens(target: Tensor, real: Tensor | None) -> Tensor:
    """[B, T, C] -> [B, C], padding left out."""
    if real is None:
        return target.mean(dim=1)
    return (target * real.unsqueeze(2)).sum(dim=1) / real.sum(dim=1, keepdim=True)


def build_multi_model(model_config: Mapping[str, Any], vocab_size: int | None) -> Data2VecMulti:
    """The model of a fairseq `model` config; absent keys take fairseq's defaults. `vocab_size` is None of pictures.

    Raises:
        ValueError: sizes that do not divide, or more target layers than there are.
    """

    def known(cls: type, values: Mapping[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in values.items() if key in cls.__dataclass_fields__ and key != "decoder"}

    own = dict((model_config.get("modalities") or {}).get("image" if vocab_size is None else "text") or {})
    decoder = DecoderConfig(**known(DecoderConfig, own.get("decoder") or {}))
    modality = ModalityConfig(**known(ModalityConfig, own), decoder=decoder)
    config, block = MultiConfig(**known(MultiConfig, model_config)), BlockConfig(**known(BlockConfig, model_config))
    targets = TargetConfig(**known(TargetConfig, model_config))
    _check_sizes(config, block, targets, modality, is_text=vocab_size is not None)
    return Data2VecMulti(config, targets, block, modality, vocab_size)


def _check_sizes(
    config: MultiConfig, block: BlockConfig, targets: TargetConfig, modality: ModalityConfig, is_text: bool
) -> None:
    decoder, where = modality.decoder, f"model.modalities.{'text' if is_text else 'image'}"
    pairs = [
        ("model.embed_dim", block.embed_dim, "model.num_heads", block.num_heads),
        ("model.embed_dim", block.embed_dim, f"{where}.decoder.decoder_groups", decoder.decoder_groups),
        (
            f"{where}.decoder.decoder_dim",
            decoder.decoder_dim,
            f"{where}.decoder.decoder_groups",
            decoder.decoder_groups,
        ),
    ]
    if not is_text:
        pairs.append((f"{where}.input_size", modality.input_size, f"{where}.patch_size", modality.patch_size))
        pairs.append(("model.embed_dim", block.embed_dim, "the positions' two axes of sines and cosines,", 4))
    for name, value, of, divisor in pairs:
        if value % divisor:
            raise ValueError(f"{name}={value} is no multiple of {of}={divisor}")
    if targets.average_top_k_layers > config.depth:
        raise ValueError(
            f"model.average_top_k_layers={targets.average_top_k_layers} is above model.depth={config.depth}, all layers"
        )
    if config.cls_loss > 0 and not modality.num_extra_tokens:
        raise ValueError(f"model.cls_loss={config.cls_loss}: it is of an extra token, {where}.num_extra_tokens=1")
