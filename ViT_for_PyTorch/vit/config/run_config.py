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

from common.device import DEVICES, PRECISIONS
from common.errors import UsageError
from vit.config import mindformers_yaml
from vit.config.ranges import check_ranges
from vit.data.augment import INTERPOLATIONS, Augmentation, rand_augment
from vit.model import lora, timm_models
from vit.model.vision_transformer import INITIALISATIONS, POOLINGS, PRESETS


@dataclass
class ModelConfig:
    """What is built. `num_classes` 0 = as many as the training folder has classes."""

    name: str = "vit_base_p16"  # also timm's, e.g. vit_small_patch16_224.augreg_in21k, or auto: load_checkpoint's own
    img_size: int | None = None  # None = the model's own size
    num_classes: int = 0
    global_pool: str | None = None  # avg or token; None = the model's own
    drop_path: float = 0.1
    init: str = "timm"  # starting weights; width or mimetic for narrow models from scratch (initialisation.py)
    train: str = (
        "all"  # head: the backbone stays as it is; lora: so do its layers, low-rank additions are trained (lora.py)
    )
    lora_rank: int = 16
    lora_alpha: float = 32  # the additions are multiplied by alpha / rank
    lora_layers: str = "qkv,proj"  # of every block; fc1 and fc2 cost a quarter more memory (docs/experiments.md)
    lora_also: str = "bias,norm,stem"  # trained whole beside the additions, as peft's bias and modules_to_save
    gradient_checkpointing: bool = False
    compile: bool = False
    fp8: bool = False  # products of the blocks' linear layers in 8 bits (common/model/fp8.py); needs precision=bf16


@dataclass
class DataConfig(Augmentation):
    """Pictures, how they are prepared, and their augmentation."""

    train_dataset_dir: str = ""
    eval_dataset_dir: str = ""
    num_workers: int = 2
    mean: list[float] | None = None  # of each channel, from 0 to 1; None = the model's own, as below
    std: list[float] | None = None
    interpolation: str | None = None  # of evaluation: bicubic, bilinear or nearest
    crop_ratio: float | None = None  # evaluation keeps this share of the shorter side


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
class KnnConfig:
    """Of --run_mode knn, with DINO's values."""

    neighbours: int = 20
    temperature: float = 0.07  # a neighbour's vote counts exp(cosine / temperature)


@dataclass
class Config:
    """One run. `batch_size` is per device; the global batch is batch_size x accumulate x ranks."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    knn: KnnConfig = field(default_factory=KnnConfig)
    epochs: int = 100
    batch_size: int = 32
    accumulate: int = 1
    max_steps: int = 0  # stop after that many optimizer steps; 0 = no limit
    seed: int = 0
    device: str = "auto"
    precision: str = "fp32"
    parallel: str = "ddp"  # over several ranks: a replica each (ddp), or the model in shards (fsdp)
    loss_scale: str = "dynamic"  # fp16: dynamic, or a number
    load_checkpoint: str = ""  # weights to start from, to evaluate or to predict with
    resume_training: str = ""  # "auto" = the newest checkpoint in output_dir if there is one, or a file
    replay: str = ""  # replay.json of a run that stopped: that one batch again from the checkpoint, and nothing else
    accept_changes: str = ""  # names that a resumed run may have otherwise than its checkpoint, with commas; or all
    class_weights: str = "none"  # balanced: rare classes count as much as frequent ones
    do_eval: bool = True
    metric_for_best: str = "top1"  # top1, top5 or loss: what best.pt is the best by
    early_stop: int = 0  # stop after so many evaluations without a better one; 0 = never
    eval_every: int = 1  # epochs between evaluations
    save_every: int = 0  # optimizer steps between checkpoints; 0 = at the end of each epoch
    keep_checkpoints: int = 2
    output_dir: str = "output"
    case_kind: str = "acc"
    profile: bool = False  # record steps 10 to 12: output_dir/profile
    log_every: int = 10


CHOICES: dict[str, tuple[str | None, ...]] = {
    "model.global_pool": (None, *POOLINGS),
    "model.init": tuple(INITIALISATIONS),
    "model.train": ("all", "head", "lora"),
    "data.interpolation": (None, *INTERPOLATIONS),
    "class_weights": ("none", "balanced"),
    "metric_for_best": ("top1", "top5", "loss"),
    "device": DEVICES,
    "precision": PRECISIONS,
    "case_kind": ("acc", "perf"),
    "parallel": ("ddp", "fsdp"),
}


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
        if isinstance(from_file, DictConfig) and mindformers_yaml.is_of_mindformers(from_file):
            theirs = mindformers_yaml.translate(OmegaConf.to_container(from_file), f"{path}")
            overrides = [*theirs.items(), *_pairs(overrides)]
        else:
            config = _merge(config, from_file, f"{path}")
    given = _pairs(overrides)
    for key, value in given:
        _check_known(key)
        config = _merge(config, _nested(key, value), f"{key}={value}")
    try:
        result = OmegaConf.to_object(config)
    except OmegaConfBaseException as error:  # an interpolation of a key that is not there
        where = f"{path}: " if path is not None else ""
        key = getattr(error, "full_key", "") or "the interpolation"
        raise UsageError(f"{where}{str(error).splitlines()[0]}: correct {key}") from None
    try:
        _check(result)
    except UsageError as error:
        is_of_file = path is not None and error.message.partition("=")[0] not in dict(given)
        raise UsageError(f"{path}: {error.message}" if is_of_file else error.message) from None
    return result


def known_keys() -> list[str]:
    """All keys, dotted, e.g. "optimizer.base_lr"."""
    return list(values_by_key(Config()))


def values_by_key(config: Config) -> dict[str, Any]:
    """`{"optimizer.base_lr": 5e-4, ...}`."""

    def walk(node: dict[str, Any], prefix: str) -> dict[str, Any]:
        flat: dict[str, Any] = {}
        for name, value in node.items():
            flat |= walk(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
        return flat

    return walk(as_dict(config), "")


def as_dict(config: Config) -> dict[str, Any]:
    """The configuration as plain values, as kept in a checkpoint."""
    return OmegaConf.to_container(OmegaConf.structured(config))


def _pairs(overrides: Mapping[str, Any] | Sequence[str | tuple[str, Any]]) -> list[tuple[str, Any]]:
    if isinstance(overrides, Mapping):
        return list(overrides.items())
    return [given if isinstance(given, tuple) else _split(given) for given in overrides]


def _split(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    key = mindformers_yaml.KEYS.get(key.strip(), key)  # MindFormers' names, e.g. runner_config.epochs
    if not equals:
        raise UsageError(f"'{text}': write overrides as key=value or section.key=value")
    if value.startswith("["):
        try:
            return key.strip(), list(OmegaConf.create(value))
        except Exception as error:  # whatever the YAML parser raises
            raise UsageError(f"'{text}': not a list such as [0.5,0.5,0.5]: {str(error).splitlines()[0]}") from None
    return key.strip(), None if value == "null" else value  # omegaconf turns the text into the key's type


def _nested(key: str, value: Any) -> DictConfig:
    config = OmegaConf.create({})
    OmegaConf.update(config, key, value)
    return config


def _check_known(key: str) -> None:
    if key not in known_keys():
        close = difflib.get_close_matches(key, known_keys(), 1, 0.4)
        hint = f"did you mean '{close[0]}'?" if close else "--help lists them"
        raise UsageError(f"unknown configuration key '{key}'; {hint}")


def _merge(config: DictConfig, other: Any, where: str) -> DictConfig:
    try:
        return OmegaConf.merge(config, other)
    except OmegaConfBaseException as error:
        raise UsageError(f"{where}: {str(error).splitlines()[0]}") from None


def _check(config: Config) -> None:
    values = values_by_key(config)
    for key, allowed in CHOICES.items():
        if values[key] not in allowed:
            raise UsageError(f"{key}={values[key]}: choose one of {', '.join(filter(None, allowed))}")
    check_ranges(config)
    lora.check(config.model.lora_layers, config.model.lora_also)
    if config.model.train != "lora":
        usual = values_by_key(Config())
        for key in ("model.lora_rank", "model.lora_alpha", "model.lora_layers", "model.lora_also"):
            if values[key] != usual[key]:
                raise UsageError(f"{key}={values[key]}: is of model.train=lora: give that too, or leave it out")
    if config.model.name not in (*PRESETS, "auto") and not timm_models.is_known(config.model.name):
        close = difflib.get_close_matches(config.model.name, PRESETS, 1, 0.4)
        raise UsageError(
            f"model.name={config.model.name}: choose one of {', '.join(PRESETS)}, auto, or a name of timm's"
            + (f"; did you mean {close[0]!r}?" if close else "")
        )
    if config.data.auto_augment:
        try:
            rand_augment(config.data.auto_augment, {})
        except (AssertionError, ValueError, KeyError, TypeError) as error:
            reason = f" ({error})" if str(error) else ""
            raise UsageError(
                f"data.auto_augment={config.data.auto_augment}: not a RandAugment of timm's{reason}; such as "
                "rand-m9-mstd0.5-inc1, or empty for none"
            ) from None
