"""data2vec text: a masked student regresses an EMA teacher's latent targets (fairseq data2vec_text.py)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from common.device import to_device
from data2vec.model.encoder import EncoderConfig, Rows, SentenceEncoder, init_bert_weights
from data2vec.model.neighbour_start import look_at_neighbours
from data2vec.model.targets import TargetConfig, average_targets, regression_loss
from data2vec.model.teacher import WithTeacher

TEACHER_INPUTS = ("masked_only", "full")
INITIAL_ATTENTION = ("random", "neighbours")
# With ema_transformer_layers_only these are copied from the student, not averaged.
SHARED_WITH_STUDENT = ("embed_tokens.", "embed_positions.", "layernorm_embedding.")


@dataclass(frozen=True)
class Data2VecConfig:
    """The model's options, named as in fairseq's Data2VecTextConfig; the last three are ours."""

    head_layers: int = 1
    loss_beta: float = 0.0
    loss_scale: float | None = None
    ema_decay: float = 0.999
    ema_end_decay: float = 0.9999
    ema_anneal_end_step: int = 300000
    ema_transformer_layers_only: bool = True
    teacher_input: str = "masked_only"
    init_std: float = 0.02
    initial_attention: str = "random"  # neighbours: neighbour_start.py


@dataclass
class BatchPlan:
    """What a forward pass needs to know about a batch's masks; made on the host by `plan_batch`."""

    rows: Rows  # the masked tokens
    has_padding: bool
    teacher_tokens: torch.Tensor  # [B, T'], T' = T, or the compact width
    teacher_rows: Rows  # the masked tokens within them
    teacher_has_padding: bool

    def to(self, device: torch.device) -> BatchPlan:
        def move(rows: Rows) -> Rows:
            return Rows(to_device(rows.flat, device), to_device(rows.slot, device), rows.width)

        tokens = to_device(self.teacher_tokens, device)
        return BatchPlan(move(self.rows), self.has_padding, tokens, move(self.teacher_rows), self.teacher_has_padding)


def plan_batch(
    src_tokens: torch.Tensor,
    target_tokens: torch.Tensor,
    mask_idx: int,
    pad_idx: int = 1,
    teacher_input: str = "masked_only",
    compact: bool = True,
    length_multiple: int = 1,
) -> BatchPlan:
    """Finds the masked tokens of a batch and lays out the teacher's input.

    In `masked_only` mode the teacher's input holds the masked tokens' ids and pads. Pads are hidden from attention and
    do not count in positions, so a compact input without them gives the same result at the masked tokens.
    """
    masked = src_tokens.eq(mask_idx)  # [B, T]
    rows = rows_of(masked, masked, length_multiple)
    has_padding = bool(src_tokens.eq(pad_idx).any())
    if teacher_input == "full":
        tokens = torch.where(target_tokens.ne(pad_idx), target_tokens, src_tokens)
        return BatchPlan(rows, has_padding, tokens, rows, has_padding)
    given = target_tokens.ne(pad_idx)
    if not compact or bool(given.all()):
        return BatchPlan(rows, has_padding, target_tokens, rows, not bool(given.all()))
    kept = rows_of(given, given, length_multiple)
    tokens = target_tokens.new_full((len(src_tokens), kept.width), pad_idx)
    tokens.view(-1)[kept.slot] = target_tokens.flatten()[kept.flat]
    within = rows_of(masked, given, length_multiple)
    return BatchPlan(
        rows, has_padding, tokens, Rows(within.slot, rows.slot, rows.width), bool(tokens.eq(pad_idx).any())
    )


def rows_of(chosen: torch.Tensor, counted: torch.Tensor, multiple: int) -> Rows:
    """Rows of the chosen tokens; their slots count the tokens in `counted` (which holds the chosen) before them."""
    width = -(-max(1, int(counted.sum(dim=1).max())) // multiple) * multiple
    rank = counted.cumsum(dim=1) - 1
    slot = torch.arange(len(chosen), device=chosen.device)[:, None] * width + rank
    flat = chosen.flatten().nonzero().squeeze(1)
    return Rows(flat, slot.flatten()[flat], width)


class TextEncoder(WithTeacher):
    """Student, regression head, and the teacher of the student."""

    def __init__(self, encoder: EncoderConfig, head_layers: int):
        super().__init__()
        self.sentence_encoder = SentenceEncoder(encoder)
        self.regression_head = _regression_head(encoder.embed_dim, head_layers)

    @property
    def student(self) -> SentenceEncoder:
        return self.sentence_encoder


def _regression_head(dim: int, layers: int) -> nn.Sequential:
    """Linear C -> 2C, GELU, (Linear 2C -> 2C, GELU)*, Linear 2C -> C; a single Linear C -> C for one layer."""
    modules: list[nn.Module] = []
    width = dim
    for _ in range(layers - 1):
        modules += [nn.Linear(width, 2 * dim), nn.GELU()]
        width = 2 * dim
    return nn.Sequential(*modules, nn.Linear(width, dim))


class Data2VecText(nn.Module):
    """The model of one pretraining step: student, head, teacher, targets and loss."""

    def __init__(self, encoder: EncoderConfig, config: Data2VecConfig, targets: TargetConfig):
        super().__init__()
        if targets.average_top_k_layers > encoder.layers:
            raise ValueError(
                f"model.average_top_k_layers={targets.average_top_k_layers}: the encoder has {encoder.layers} layers"
            )
        if config.teacher_input not in TEACHER_INPUTS:
            raise ValueError(f"model.teacher_input={config.teacher_input}: choose one of {', '.join(TEACHER_INPUTS)}")
        if config.initial_attention not in INITIAL_ATTENTION:
            raise ValueError(
                f"model.initial_attention={config.initial_attention}: choose one of {', '.join(INITIAL_ATTENTION)}"
            )
        self.config = config
        self.targets = targets
        self.encoder = TextEncoder(encoder, config.head_layers)
        self.apply(partial(init_bert_weights, std=config.init_std))
        if config.initial_attention == "neighbours":
            look_at_neighbours(self.encoder.student, config.init_std)

    @property
    def teacher_holder(self) -> WithTeacher:
        return self.encoder

    @property
    def copied_to_teacher(self) -> tuple[str, ...]:
        """Beginnings of the student's parameter names that the teacher takes over unaveraged."""
        return SHARED_WITH_STUDENT if self.config.ema_transformer_layers_only else ()

    @property
    def picture_size(self) -> None:
        """There are no pictures."""

    @property
    def pad_index(self) -> int:
        return self.encoder.sentence_encoder.config.pad_index

    def plan(self, src_tokens: torch.Tensor, target_tokens: torch.Tensor, mask_idx: int) -> BatchPlan:
        """`plan_batch` for this model."""
        compact = not self.targets.uses_whole_sequence
        return plan_batch(src_tokens, target_tokens, mask_idx, self.pad_index, self.config.teacher_input, compact)

    def forward(
        self, src_tokens: torch.Tensor, target_tokens: torch.Tensor, mask_idx: int, plan: BatchPlan | None = None
    ) -> dict[str, Any]:
        """One step's loss.

        Args:
            src_tokens: int64 [B, T], masked.
            target_tokens: int64 [B, T], original ids at masked positions, pad elsewhere.
            mask_idx: id of <mask>; positions that hold it are predicted (tokens left unmasked are not: fairseq #4229).
            plan: made ahead by `self.plan` (in a loader worker); else made here, which waits for the device.

        Returns:
            loss_sum: fp32 scalar, summed over masked tokens and features; divide by sample_size for the mean.
            sample_size: int N, masked tokens of the batch.
            pred, target: fp32 [N, C].
        """
        plan = plan or self.plan(src_tokens, target_tokens, mask_idx)
        target = self.make_targets(plan)  # [N, C]
        x = self.encoder.sentence_encoder(src_tokens, plan.has_padding, plan.rows)  # [N, C]
        pred = self.encoder.regression_head(x).float()
        loss = regression_loss(pred, target, self.config.loss_beta)
        scale = self.config.loss_scale
        if scale is None or scale <= 0:
            scale = 1 / math.sqrt(pred.shape[-1])
        return {"loss_sum": loss * scale, "sample_size": len(plan.rows.flat), "pred": pred, "target": target}

    @torch.no_grad()
    def make_targets(self, plan: BatchPlan) -> torch.Tensor:
        """The teacher's normalised, averaged FFN outputs at the masked tokens: fp32 [N, C]."""
        teacher = self.encoder.teacher or self.encoder.make_teacher()
        whole = self.targets.uses_whole_sequence
        first = len(teacher.layers) - self.targets.average_top_k_layers

        def results():
            x, key_mask = teacher.embed(plan.teacher_tokens, plan.teacher_has_padding)
            for i, layer in enumerate(teacher.layers[:-1]):
                x, result = layer(x, key_mask)
                if i >= first:
                    yield result if whole else result.flatten(0, 1).index_select(0, plan.teacher_rows.flat)
            yield teacher.layers[-1](x, key_mask, None if whole else plan.teacher_rows)[1]

        target = average_targets(results(), self.targets)
        return target.flatten(0, 1).index_select(0, plan.teacher_rows.flat) if whole else target


def build_model(model_config: dict[str, Any], vocab_size: int) -> Data2VecText:
    """The text model of a fairseq `model` config (nested dict, as in base.yaml or a checkpoint's cfg).

    Keys that are absent take fairseq's defaults.

    Raises:
        ValueError: an option this code does not implement, with what to do.
    """
    config = dict(model_config)
    encoder = encoder_config(config, vocab_size)
    return Data2VecText(encoder, Data2VecConfig(**_known(Data2VecConfig, config)), target_config(config))


def encoder_config(model_config: Mapping[str, Any], vocab_size: int) -> EncoderConfig:
    """The encoder of a fairseq `model` config. ValueError as of `build_model`."""
    transformer = dict(model_config.get("transformer") or {})
    sizes = dict(transformer.get("encoder") or {})
    _refuse_unsupported(transformer, sizes)
    encoder = EncoderConfig(vocab_size=vocab_size, **_known(EncoderConfig, {**transformer, **sizes}))
    if encoder.embed_dim % encoder.attention_heads:
        raise ValueError(
            f"model.transformer.encoder: embed_dim {encoder.embed_dim} is no multiple of attention_heads "
            f"{encoder.attention_heads}"
        )
    return encoder


def target_config(model_config: Mapping[str, Any]) -> TargetConfig:
    """The target options of a fairseq `model` config."""
    return TargetConfig(**_known(TargetConfig, model_config))


def _known(cls: type, values: Mapping[str, Any]) -> dict[str, Any]:
    fields = cls.__dataclass_fields__
    return {key: value for key, value in values.items() if key in fields and key != "vocab_size"}


def _refuse_unsupported(transformer: dict[str, Any], encoder: dict[str, Any]) -> None:
    """Options of fairseq's transformer that data2vec text never used: refused when set, rather than ignored."""
    wanted = {
        "activation_fn": "gelu",
        "adaptive_input": False,
        "no_token_positional_embeddings": False,
        "encoder.normalize_before": False,
        "encoder.learned_pos": True,
        "encoder.layerdrop": 0.0,
        "encoder.layers_to_keep": None,
        "encoder.xformers_att_config": None,
    }
    for key, only in wanted.items():
        source = encoder if key.startswith("encoder.") else transformer
        value = source.get(key.removeprefix("encoder."), only)
        if value != only:
            raise ValueError(f"model.transformer.{key}={value} is not supported here, only {only}")
