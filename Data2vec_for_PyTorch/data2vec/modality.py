"""Text or images: what a run's data, model and forward pass are. All else is the same for both."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from common.checkpoint_file import CheckpointError
from common.errors import UsageError
from data2vec.config.keys import MULTI, PICTURES
from data2vec.data.dictionary import MASK
from data2vec.data.epochs import SplitBatches
from data2vec.data.multi.text import MultiTextData
from data2vec.data.pretraining_data import PretrainingData
from data2vec.model.flops import multi_flops, text_flops, vision_flops
from data2vec.model.multi.model import Data2VecMulti, build_multi_model
from data2vec.model.text_model import Data2VecText, build_model
from data2vec.model.vision_model import Data2VecVision, build_vision_model
from data2vec.weights.pretrained import load_weights
from data2vec.weights.vocabulary import check_vocabulary


def is_vision(config: DictConfig) -> bool:
    return config.task._name in PICTURES


def is_multi(config: DictConfig) -> bool:
    """Whether the objective is data2vec 2.0's."""
    return config.model._name == MULTI


def fps_unit(config: DictConfig) -> str:
    """What a sample is called in logs."""
    return "images/sec" if is_vision(config) else "sequences/sec"


def open_data(config: DictConfig, rank: int = 0, world_size: int = 1) -> SplitBatches:
    """The run's data. UsageError when the folder is not one."""
    if not is_vision(config):
        return (MultiTextData if is_multi(config) else PretrainingData)(config, rank, world_size)
    if is_multi(config):
        from data2vec.data.multi.images import MultiImageData as ImageData  # torchvision: a text run does without
    else:
        from data2vec.data.image_data import ImagePretrainingData as ImageData
    return ImageData(config, rank, world_size)


def build(config: DictConfig, data: SplitBatches) -> torch.nn.Module:
    """The configuration's model, for that data. UsageError for options that do not fit together."""
    options = OmegaConf.to_container(config.model)
    try:
        if is_multi(config):
            return build_multi_model(options, None if is_vision(config) else len(data.vocab))
        if is_vision(config):
            return build_vision_model(options)
        return build_model(options, len(data.vocab))
    except ValueError as error:
        raise UsageError(str(error)) from None


def load_checkpoint(
    model: torch.nn.Module, checkpoint: dict[str, Any], path: str | Path, config: DictConfig, data: SplitBatches
) -> str:
    """`load_weights` in the model of that data. UsageError where one or the other does not fit the checkpoint."""
    try:
        words = load_weights(model, checkpoint, path)
    except CheckpointError as error:
        raise UsageError(str(error)) from None
    if not is_vision(config):
        check_vocabulary(data.vocab, config.task.data, checkpoint, path)
    return words


def forward_of(
    config: DictConfig, data: SplitBatches, device: torch.device
) -> Callable[[torch.nn.Module, Any], dict[str, Any]]:
    """function of (model, batch) that returns the model's output dict."""
    if is_vision(config):
        from data2vec.data.image_data import Normalize

        normalize = Normalize(config, device)
        if is_multi(config):
            return lambda model, batch: model(normalize(batch.source), batch.plan)
        return lambda model, batch: model(normalize(batch.images), batch.mask, batch.rows)
    if is_multi(config):
        return lambda model, batch: model(batch.source, batch.plan, batch.has_padding)
    mask_idx = data.vocab.index(MASK)
    return lambda model, batch: model(batch.src_tokens, batch.target_tokens, mask_idx, batch.plan)


def flops_of(model: torch.nn.Module, batch: Any) -> float:
    """FLOPs of a micro-batch of pretraining on this rank, for MFU; 0 of other trainings and where there are no rows."""
    samples = len(batch.id)
    if samples and isinstance(model, Data2VecMulti):
        length = batch.source.shape[1] if model.picture_size is None else batch.num_tokens // samples
        plan = batch.plan
        return multi_flops(model, samples, length, plan.masks, plan.visible.width, len(plan.hidden))
    if samples and isinstance(model, Data2VecText):
        return text_flops(model, samples, batch.src_tokens.shape[1], len(batch.plan.rows.flat))
    return vision_flops(model, samples, len(batch.rows)) if isinstance(model, Data2VecVision) else 0.0
