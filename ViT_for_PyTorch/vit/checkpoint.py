"""What a training run keeps to go on from: one file a checkpoint, everything in it plain tensors and values."""

from __future__ import annotations

import warnings
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from common import checkpoint_file
from common.device import UsageError


@dataclass
class TrainState:
    """Where a run is. All randomness follows from (seed, step), so this and the tensors are the whole state."""

    step: int = 0  # optimizer steps done
    best_top1: float = -1.0  # percent, on the evaluation set; -1 = not evaluated yet
    bad_files: dict[str, str] = field(default_factory=dict)  # broken training pictures of all ranks, and what is wrong


@dataclass(frozen=True)
class RunShape:
    """What must not change between a run and its continuation, or steps and samples would no longer match."""

    global_batch: int
    steps_per_epoch: int
    num_classes: int
    seed: int


def folder_of(output_dir: str | Path) -> Path:
    """Where a run's checkpoints are: checkpoint-<step>.pt, best.pt and class_names.json."""
    return Path(output_dir) / "checkpoints"


def save(
    path: Path,
    state: TrainState,
    shape: RunShape,
    config: dict[str, Any],
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    ema: nn.Module | None,
) -> None:
    """Writes a checkpoint atomically; `model` is the plain module, not its DDP or compiled wrapper."""
    checkpoint_file.save(
        {
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "scaler": scaler.state_dict(),
            "ema": ema.state_dict() if ema is not None else None,
            "state": asdict(state),
            "shape": asdict(shape),
            "config": config,
        },
        path,
    )


def find(resume_training: str, output_dir: str) -> Path | None:
    """The checkpoint to continue from: a named file, or with "auto" the newest of the run's own folder.

    Raises:
        UsageError: the named file does not exist.
    """
    if not resume_training:
        return None
    if resume_training == "auto":
        return checkpoint_file.newest(folder_of(output_dir), "checkpoint-*.pt")
    if not Path(resume_training).is_file():
        raise UsageError(f"--resume_training {resume_training}: no such file; 'auto' takes the newest in --output_dir")
    return Path(resume_training)


def restore(
    path: Path,
    shape: RunShape,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    ema: nn.Module | None,
) -> TrainState:
    """Loads a checkpoint of this project into the objects of a run and returns where it was.

    Raises:
        UsageError: not a training checkpoint of this project, or one of a run of another shape.
    """
    content = checkpoint_file.load(path)
    if not isinstance(content, dict) or not {"model", "optimizer", "state", "shape"} <= content.keys():
        raise UsageError(
            f"{path}: holds weights but no training state; give it as --load_checkpoint to start a new run from it"
        )
    differences = [
        f"{key} was {content['shape'].get(key)}, is now {value}"
        for key, value in asdict(shape).items()
        if content["shape"].get(key) != value
    ]
    if differences:
        raise UsageError(
            f"{path}: cannot be continued by this run: {'; '.join(differences)}. The global batch is batch_size x "
            "accumulate x ranks: with fewer ranks raise accumulate; the training folder and the seed must be the same"
        )
    model.load_state_dict(content["model"])
    optimizer.load_state_dict(content["optimizer"])
    if content["scaler"]:
        scaler.load_state_dict(content["scaler"])
    if ema is not None:
        if content["ema"] is None:
            warnings.warn(f"{path} has no weight average: it starts from the loaded weights", stacklevel=2)
            ema.load_state_dict(content["model"])
        else:
            ema.load_state_dict(content["ema"])
    return TrainState(**content["state"])
