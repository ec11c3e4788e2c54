"""The configuration of a run: one YAML file, then overrides; unknown keys and wrong types are errors.

config = load("configs/run_vit_base_p16_224_100ep.yaml", ["optimizer.base_lr=1e-3", "epochs=50"])
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from common.apex_options import BACKENDS
from common.device import DEVICES, PRECISIONS
from common.errors import UsageError
from vit.model import INITIALISATIONS, model_names


@dataclass
class ModelConfig:
    """What is built. `num_classes` 0 = as many as the training folder has classes."""

    name: str = "vit_base_p16"
    img_size: int | None = None  # None = the preset's size
    num_classes: int = 0
    global_pool: str = "avg"
    drop_path: float = 0.1
    init: str = "timm"  # starting weights; width or mimetic for narrow models from scratch (initialisation.py)
    gradient_checkpointing: bool = False
    compile: bool = False


@dataclass
class DataConfig:
    """Pictures and their augmentation, with MAE's fine-tuning values."""

    train_dataset_dir: str = ""
    eval_dataset_dir: str = ""
    num_workers: int = 2
    min_crop_scale: float = 0.08
    horizontal_flip: float = 0.5
    auto_augment: str = "rand-m9-mstd0.5-inc1"
    random_erasing: float = 0.25
    mixup: float = 0.8
    cutmix: float = 1.0
    mixup_prob: float = 1.0
    mixup_switch_prob: float = 0.5
    label_smoothing: float = 0.1


@dataclass
class OptimizerConfig:
    """AdamW with layer decay and a cosine schedule per step. The peak rate is base_lr x global batch / 256."""

    base_lr: float = 5e-4
    min_lr: float = 1e-6
    warmup_epochs: float = 5
    weight_decay: float = 0.05
    layer_decay: float = 0.65
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    clip_grad: float = 0.0  # largest gradient norm; 0 = no clipping
    ema_decay: float = 0.0  # weights' moving average; 0 = none


@dataclass
class Config:
    """One run. `batch_size` is per device; the global batch is batch_size x accumulate x ranks."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    epochs: int = 100
    batch_size: int = 32
    accumulate: int = 1
    max_steps: int = 0  # stop after that many optimizer steps; 0 = no limit
    seed: int = 0
    device: str = "auto"
    precision: str = "fp32"
    parallel: str = "ddp"  # over several ranks: a replica each (ddp), or the model in shards (fsdp)
    loss_scale: str = "dynamic"  # fp16: dynamic, or a number
    amp_backend: str = "native"  # apex: apex.amp at level O1, where it is installed
    load_checkpoint: str = ""  # weights to start from, to evaluate or to predict with
    resume_training: str = ""  # "auto" = the newest checkpoint in output_dir if there is one, or a file
    do_eval: bool = True
    eval_every: int = 1  # epochs between evaluations
    save_every: int = 0  # optimizer steps between checkpoints; 0 = at the end of each epoch
    keep_checkpoints: int = 2
    output_dir: str = "output"
    case_kind: str = "acc"
    profile: bool = False  # record steps 10 to 12: output_dir/profile
    log_every: int = 10


def load(path: str | Path | None, overrides: Mapping[str, Any] | Sequence[str] = ()) -> Config:
    """Reads a YAML file and lays overrides over it.

    Args:
        path: the YAML file; None for the defaults above.
        overrides: `{"optimizer.base_lr": 1e-3}` or `["optimizer.base_lr=1e-3"]`.

    Raises:
        UsageError: no such file, an unknown key (the nearest one is named), or a value of the wrong type or range.
    """
    config = OmegaConf.structured(Config)
    if path is not None:
        if not Path(path).is_file():
            raise UsageError(f"--config {path}: no such file")
        try:
            from_file = OmegaConf.load(path)
        except Exception as error:  # whatever the YAML parser raises
            raise UsageError(f"{path}: not readable as YAML: {error}") from None
        config = _merge(config, from_file, f"{path}")
    pairs = overrides.items() if isinstance(overrides, Mapping) else (_split(text) for text in overrides)
    for key, value in pairs:
        _check_known(key)
        config = _merge(config, _nested(key, value), f"{key}={value}")
    result = OmegaConf.to_object(config)
    _check(result)
    return result


def known_keys() -> list[str]:
    """All keys, dotted, e.g. "optimizer.base_lr"."""

    def walk(node: dict[str, Any], prefix: str) -> list[str]:
        keys: list[str] = []
        for name, value in node.items():
            keys += walk(value, f"{prefix}{name}.") if isinstance(value, dict) else [f"{prefix}{name}"]
        return keys

    return walk(as_dict(Config()), "")


def as_dict(config: Config) -> dict[str, Any]:
    """The configuration as plain values, as kept in a checkpoint."""
    return OmegaConf.to_container(OmegaConf.structured(config))


def _split(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not equals:
        raise UsageError(f"'{text}': overrides are written key=value or section.key=value")
    return key.strip(), None if value == "null" else value  # omegaconf turns the text into the key's type


def _nested(key: str, value: Any) -> DictConfig:
    config = OmegaConf.create({})
    OmegaConf.update(config, key, value)
    return config


def _check_known(key: str) -> None:
    if key not in known_keys():
        close = difflib.get_close_matches(key, known_keys(), 1, 0.4)
        raise UsageError(f"unknown configuration key '{key}'" + (f"; did you mean '{close[0]}'?" if close else ""))


def _merge(config: DictConfig, other: Any, where: str) -> DictConfig:
    try:
        return OmegaConf.merge(config, other)
    except OmegaConfBaseException as error:
        raise UsageError(f"{where}: {str(error).splitlines()[0]}") from None


def _check(config: Config) -> None:
    choices = {
        "model.name": (config.model.name, model_names()),
        "model.global_pool": (config.model.global_pool, ("avg", "token")),
        "model.init": (config.model.init, tuple(INITIALISATIONS)),
        "device": (config.device, DEVICES),
        "precision": (config.precision, PRECISIONS),
        "case_kind": (config.case_kind, ("acc", "perf")),
        "parallel": (config.parallel, ("ddp", "fsdp")),
        "amp_backend": (config.amp_backend, BACKENDS),
    }
    for key, (value, allowed) in choices.items():
        if value not in allowed:
            raise UsageError(f"{key}={value}: choose one of {', '.join(allowed)}")
    if config.amp_backend == "apex" and config.precision != "fp32":
        raise UsageError(f"amp_backend=apex: does its own casts, precision={config.precision} would be a second one")
    for key in ("epochs", "batch_size", "accumulate", "eval_every", "log_every"):
        if getattr(config, key) < 1:
            raise UsageError(f"{key}={getattr(config, key)}: must be at least 1")
    for key in ("max_steps", "save_every", "keep_checkpoints"):
        if getattr(config, key) < 0:
            raise UsageError(f"{key}={getattr(config, key)}: must not be negative")
