"""What a training run keeps to go on from: a file, or of a sharded run a folder; plain tensors and values only."""

from __future__ import annotations

import re
import warnings
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from common import checkpoint_file, shards
from common.errors import UsageError
from common.model import adapters
from common.update import LossScale
from vit.model import lora


@dataclass
class TrainState:
    """Where a run is. All randomness follows from (seed, step), so this and the tensors are the whole state."""

    step: int = 0  # optimizer steps done
    best_top1: float = -1.0  # percent, on the evaluation set; -1 = not evaluated yet
    best: float | None = None  # of `metric_for_best`, the larger the better; None = not evaluated yet
    stale: int = 0  # evaluations since it
    evaluated: int = 0  # step of the last evaluation
    bad_files: dict[str, str] = field(default_factory=dict)  # broken training pictures of all ranks, and what is wrong


@dataclass(frozen=True)
class RunShape:
    """What must not change between a run and its continuation, or steps and samples would no longer match."""

    global_batch: int
    steps_per_epoch: int
    num_classes: int
    seed: int


def folder_of(output_dir: str | Path) -> Path:
    """Where a run's checkpoints are: checkpoint-<step>.pt (sharded: checkpoint-<step>/), best.pt, class_names.json."""
    return Path(output_dir) / "checkpoints"


def values(
    state: TrainState,
    shape: RunShape,
    scale: LossScale,
    *,
    config: dict[str, Any],
    vit_config: dict[str, Any],
    identity: dict[str, Any],
) -> dict[str, Any]:
    """All that a checkpoint holds but tensors: the run's options, the description of its model, and what it is of."""
    kept = {"state": asdict(state), "shape": asdict(shape), "scaler": scale.state_dict()}
    return kept | {"config": config, "vit_config": vit_config, "identity": identity}


def tensors(model: nn.Module, optimizer: torch.optim.Optimizer, ema: nn.Module | None) -> dict[str, Any]:
    """The tensors of a checkpoint; `model` is the plain module, not its DDP or compiled wrapper."""
    return {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "ema": ema.state_dict() if ema is not None else None,
    }


def whole(values: dict[str, Any], model: nn.Module, ema: nn.Module | None) -> dict[str, Any]:
    """The weights of a sharded run, or of one with LoRA, for one plain file without the optimizer; empty elsewhere.

    All ranks of a sharded run call it, of another one the main rank.
    """
    options = values["config"]

    def state_of(module: nn.Module) -> dict[str, Tensor]:
        state = shards.whole_state(module) if options["parallel"] == "fsdp" else module.state_dict()
        return adapters.merged(state, lora.scale_of(options["model"])) if adapters.has_adapters(state) else state

    weights = {"model": state_of(model), "ema": None if ema is None else state_of(ema)}
    return weights | values if weights["model"] else {}  # on the main rank alone


def newest(folder: Path) -> Path | None:
    """The newest checkpoint of a folder that is whole, sharded or not; None when there is none."""
    found = [checkpoint_file.newest(folder, "checkpoint-*.pt"), shards.newest_shards(folder)]
    return max((path for path in found if path is not None), key=_step_of, default=None)


def _step_of(path: Path) -> int:
    return int(re.findall(r"\d+", path.name)[-1])


def find(resume_training: str, output_dir: str) -> Path | None:
    """The checkpoint to continue from: a named one, or with "auto" the newest of the run's own folder.

    Raises:
        UsageError: the named one does not exist, or is not whole.
    """
    if not resume_training:
        return None
    if resume_training == "auto":
        return newest(folder_of(output_dir))
    if not Path(resume_training).is_file() and not (Path(resume_training) / shards.PROGRESS).is_file():
        raise UsageError(
            f"--resume_training {resume_training}: no such file, nor a sharded checkpoint's folder; 'auto' takes the "
            "newest in --output_dir"
        )
    return Path(resume_training)


def read_values(path: Path) -> dict[str, Any]:
    """What a checkpoint holds; of a sharded one all but the tensors.

    Raises:
        UsageError: not a training checkpoint of this project.
    """
    content = shards.load_progress(path) if path.is_dir() else checkpoint_file.load(path)
    wanted = {"state", "shape"} if path.is_dir() else {"model", "optimizer", "state", "shape"}
    if not isinstance(content, dict) or not wanted <= content.keys():
        raise UsageError(
            f"{path}: holds weights but no training state; give it as --load_checkpoint to start a new run from it"
        )
    return content


def accumulate_on(path: Path, batch_size: int, accumulate: int, ranks: int) -> int:
    """How many micro-batches a step of the run at `path` takes on `ranks` ranks; else `accumulate` as it is."""
    values = read_values(path)
    total, before = values["shape"]["global_batch"], values["config"]
    ranks_before = total // (before["batch_size"] * before["accumulate"])
    if ranks == ranks_before or batch_size != before["batch_size"] or total % (batch_size * ranks):
        return accumulate
    return total // (batch_size * ranks)


def restore(
    path: Path,
    content: dict[str, Any],
    shape: RunShape,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scale: LossScale,
    ema: nn.Module | None,
) -> TrainState:
    """Loads a checkpoint into the objects of a run and returns where it was. All ranks call it.

    The checkpoint, of which `content` is what `read_values` gives, may be sharded or not, and so may the run.

    Raises:
        UsageError: not a training checkpoint of this project, or one of a run of another shape.
    """
    differences = [
        f"{key} was {content['shape'].get(key)}, is now {value}"
        for key, value in asdict(shape).items()
        if content["shape"].get(key) != value
    ]
    if differences:
        raise UsageError(
            f"{path}: cannot be continued by this run: {'; '.join(differences)}. The global batch is batch_size x "
            "accumulate x ranks: choose them so that it stays; the training folder and the seed must be the same"
        )
    has_ema = content["has_ema"] if path.is_dir() else content["ema"] is not None
    if path.is_dir():
        shards.load_shards(path, optimizer, model, **({"ema": ema} if ema is not None and has_ema else {}))
    else:
        shards.load_whole_model(model, content["model"])
        shards.load_whole_optimizer(optimizer, content["optimizer"])
        if ema is not None and has_ema:
            shards.load_whole_model(ema, content["ema"])
    if content["scaler"]:
        scale.load_state_dict(content["scaler"])
    if ema is not None and not has_ema:
        warnings.warn(f"{path} has no weight average: it starts from the loaded weights", stacklevel=2)
        ema.load_state_dict(model.state_dict())
    return TrainState(**content["state"])
