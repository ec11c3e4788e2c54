"""A YAML file of MindFormers as a configuration of ours: what it says of model, data, recipe and run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from common.errors import UsageError

# MindFormers' key -> ours
KEYS = {
    "seed": "seed",
    "output_dir": "output_dir",
    "load_checkpoint": "load_checkpoint",
    "resume_training": "resume_training",
    "do_eval": "do_eval",
    "profile": "profile",
    "runner_config.epochs": "epochs",
    "runner_config.batch_size": "batch_size",
    "runner_config.image_size": "model.img_size",
    "trainer.model_name": "model.name",
    "train_dataset.data_loader.dataset_dir": "data.train_dataset_dir",
    "train_dataset.num_parallel_workers": "data.num_workers",
    "train_dataset.mixup_op.mixup_alpha": "data.mixup",
    "train_dataset.mixup_op.cutmix_alpha": "data.cutmix",
    "train_dataset.mixup_op.prob": "data.mixup_prob",
    "train_dataset.mixup_op.switch_prob": "data.mixup_switch_prob",
    "train_dataset.mixup_op.label_smoothing": "data.label_smoothing",
    "eval_dataset.data_loader.dataset_dir": "data.eval_dataset_dir",
    "model.model_config.drop_path_rate": "model.drop_path",
    "model.model_config.use_mean_pooling": "model.global_pool",
    "lr_schedule.learning_rate": "optimizer.base_lr",
    "lr_schedule.lr_end": "optimizer.min_lr",
    "lr_schedule.warmup_epochs": "optimizer.warmup_epochs",
    "layer_decay": "optimizer.layer_decay",
    "optimizer.weight_decay": "optimizer.weight_decay",
    "optimizer.beta1": "optimizer.beta1",
    "optimizer.beta2": "optimizer.beta2",
    "optimizer.eps": "optimizer.eps",
}
VALUES: dict[str, Callable[[Any], Any]] = {
    "resume_training": lambda value: "auto" if value is True else value or "",
    "model.model_config.use_mean_pooling": lambda value: "avg" if value else "token",
    "output_dir": lambda value: value or "output",
    "load_checkpoint": lambda value: value or "",
}
# (transform's type, its field) -> ours
TRANSFORMS = {
    ("RandomHorizontalFlip", "prob"): "data.horizontal_flip",
    ("rand_augment_transform", "config_str"): "data.auto_augment",
    ("RandomErasing", "probability"): "data.random_erasing",
}
# what must have these values, since nothing else is built here
FIXED = {
    "model.model_config.post_layernorm_residual": False,
    "model.model_config.hidden_act": "gelu",
    "model.model_config.attention_probs_dropout_prob": 0,
    "model.model_config.hidden_dropout_prob": 0,
    "model.model_config.num_channels": 3,
    "lr_schedule.type": "cosine",
    "optimizer.type": "adamw",
    "lr_scale_factor": 256,
}


def is_of_mindformers(content: Mapping[str, Any]) -> bool:
    return "runner_config" in content or "train_dataset" in content


def translate(content: Mapping[str, Any], where: str) -> dict[str, Any]:
    """`{key of ours: value}` of a file. What it says of graphs, parallel strategies and callbacks means nothing here.

    Raises:
        UsageError: it asks for something that this project does not have.
    """
    flat = dict(_flat(content))
    for key, only in FIXED.items():
        if key in flat and flat[key] != only:
            raise UsageError(f"{where}: {key}: {flat[key]} is not supported here, only {only}")
    found = {ours: VALUES.get(key, lambda value: value)(flat[key]) for key, ours in KEYS.items() if key in flat}
    for step in (content.get("train_dataset") or {}).get("transforms") or []:
        if step.get("type") == "RandomResizedCrop" and "scale" in step:
            found["data.min_crop_scale"] = step["scale"][0]
        for (kind, field), ours in TRANSFORMS.items():
            if step.get("type") == kind and field in step:
                found[ours] = step[field]
    return {key: value for key, value in found.items() if value is not None}


def _flat(node: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in node.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
