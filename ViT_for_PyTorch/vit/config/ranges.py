"""The range of every number of the configuration; nan and inf are in none."""

from __future__ import annotations

from typing import Any

from common.command_line.ranges import Range, at_least_one, below_one, count, fraction, not_negative, positive, share
from common.errors import UsageError

RANGES = {
    "model.img_size": Range(1, 16384, whole=True),
    "model.num_classes": count,
    "model.drop_path": below_one,
    "model.lora_rank": at_least_one,
    "model.lora_alpha": positive,
    "data.num_workers": Range(0, 1024, whole=True),
    "data.mean": Range(-10, 10),
    "data.std": Range(0, 10, without=(0,)),
    "data.crop_ratio": share,
    "data.min_crop_scale": share,
    "data.horizontal_flip": fraction,
    "data.random_erasing": fraction,
    "data.mixup": Range(0, 1000),
    "data.cutmix": Range(0, 1000),
    "data.mixup_prob": fraction,
    "data.mixup_switch_prob": fraction,
    "data.label_smoothing": below_one,
    "optimizer.base_lr": positive,
    "optimizer.min_lr": not_negative,
    "optimizer.warmup_epochs": not_negative,
    "optimizer.weight_decay": not_negative,
    "optimizer.layer_decay": share,
    "optimizer.beta1": below_one,
    "optimizer.beta2": below_one,
    "optimizer.eps": positive,
    "optimizer.clip_grad": not_negative,
    "optimizer.ema_decay": below_one,
    "knn.neighbours": at_least_one,
    "knn.temperature": Range(0.01, 1000),  # exp(1 / 0.01) is the largest vote that fp32 holds
    "epochs": at_least_one,
    "batch_size": at_least_one,
    "accumulate": at_least_one,
    "max_steps": count,
    "seed": Range(0, 2**63 - 1, whole=True),
    "eval_every": at_least_one,
    "save_every": count,
    "keep_checkpoints": count,
    "early_stop": count,
    "log_every": at_least_one,
}


def check_ranges(config: Any) -> None:
    """UsageError for the first number of a `Config` that is outside its range; lists must have a number a channel."""
    for key, allowed in RANGES.items():
        value = config
        for part in key.split("."):
            value = getattr(value, part)
        if value is None:
            continue
        if isinstance(value, list) and len(value) != 3:
            raise UsageError(f"{key}={value}: give three numbers, one a channel")
        for number in value if isinstance(value, list) else [value]:
            allowed.require(key, number)
