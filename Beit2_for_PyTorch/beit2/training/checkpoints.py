"""Checkpoints of a training run in the reference's format, found again and continued exactly (reference `utils.py`)."""

from __future__ import annotations

import argparse
import json
import os
import re
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

from beit2.weights.download import local_file
from beit2.weights.files import read_checkpoint
from common import distributed, shards
from common.distributed import World
from common.errors import UsageError
from common.run_log import RunLog
from common.update import LossScale

NETWORK = "Beit2_for_PyTorch"
LATEST = "checkpoint.pth"
SHARDED = "checkpoint-sharded"  # a folder, of FSDP2 runs
HELD_OUT = "top-1 of held-out pictures, %"  # what the result file's accuracy is, of labelled pictures
# A GradScaler's whole state, at its start. The reference's resume needs one even where nothing was scaled.
_GRAD_SCALER = {"scale": 65536.0, "growth_factor": 2.0, "backoff_factor": 0.5, "growth_interval": 2000}
_GRAD_SCALER["_growth_tracker"] = 0
# of a checkpoint in the reference's format; all else in it is "kept" by its reader
_FORMAT = {"model", "optimizer", "epoch", "args", "scaler", "progress"}


def plain_options(options: argparse.Namespace) -> argparse.Namespace:
    """The options with nothing but plain values, so that any reader can load them."""
    plain = (bool, int, float, str, list, type(None))
    return argparse.Namespace(**{k: v if isinstance(v, plain) else str(v) for k, v in vars(options).items()})


def training_state(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scale: LossScale,
    options: argparse.Namespace,
    progress: dict[str, Any],
    epoch: int,
    **extra: Any,
) -> dict[str, Any]:
    """A checkpoint's content: the reference's keys (model, optimizer, epoch, args, scaler) and our `progress`.

    `epoch` is the last one that was finished, from 0 (-1: none); a reader that knows epochs only goes on after it.
    """
    return {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "epoch": epoch,
        "args": plain_options(options),
        "scaler": _GRAD_SCALER | scale.state_dict(),
        "progress": progress,
        **extra,
    }


def find_checkpoint(resume: str, auto_resume: bool, output_dir: str | Path) -> Path | None:
    """The file to continue from: `resume` if given, else with auto_resume the newest good one of the output folder.

    Sharded runs have a folder `checkpoint-sharded` in the place of checkpoint.pth; any run goes on from either. A
    damaged one is passed over, with a warning, for the other and then the highest checkpoint-N.pth.
    """
    if resume and resume != "auto":
        return local_file(resume)
    if not (auto_resume or resume == "auto"):
        return None
    folder = Path(output_dir)
    latest = [path for path in (folder / LATEST, shards.saved_at(folder / SHARDED)) if path and path.exists()]
    latest.sort(key=lambda path: path.stat().st_mtime_ns, reverse=True)
    numbered = [p for p in folder.glob("checkpoint-*.pth") if re.fullmatch(r"checkpoint-\d+", p.stem)]
    numbered.sort(key=lambda p: int(p.stem.split("-")[1]), reverse=True)
    for path in (*latest, *numbered):
        try:
            if path.is_file():  # of a folder it is known
                read_checkpoint(path)
            return path
        except UsageError as error:
            warnings.warn(f"passing over a damaged checkpoint: {error}", stacklevel=2)
    return None


def load_training_state(
    path: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scale: LossScale,
    steps_per_epoch: int,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Restores a checkpoint of ours or of the reference; returns its progress ({"step": ...}) and what it has besides.

    Where the optimizer or the epoch is missing only the weights are loaded, as in the reference; it has no progress.

    Raises:
        UsageError: the checkpoint of another model, or one in mid-epoch whose epochs had another number of steps.
    """
    checkpoint = read_checkpoint(path)
    load_model(model, checkpoint.get("model", checkpoint), path)
    if "optimizer" not in checkpoint or "epoch" not in checkpoint:
        return {}, {}
    load_optimizer(optimizer, checkpoint["optimizer"], path)
    scale.load_state_dict(checkpoint.get("scaler") or {})
    progress = checkpoint.get("progress") or {"step": (checkpoint["epoch"] + 1) * steps_per_epoch}
    kept = {name: value for name, value in checkpoint.items() if name not in _FORMAT}
    return fit_progress(progress, steps_per_epoch, path), kept


def run_shape(steps_per_epoch: int) -> dict[str, int]:
    """What a checkpoint notes beside the progress, for `fit_progress`."""
    return {"steps_per_epoch": steps_per_epoch, "ranks": distributed.world_size()}


def fit_progress(progress: dict[str, Any], steps_per_epoch: int, path: Path) -> dict[str, Any]:
    """A checkpoint's progress, and what a sharded one has beside it, for epochs of `steps_per_epoch` steps.

    Raises:
        UsageError: its epochs had another number of steps, and it is in mid-epoch or was made on other ranks: a step
            would be of another batch.
    """
    progress = dict(progress)
    theirs, ranks = progress.pop("steps_per_epoch", steps_per_epoch), progress.pop("ranks", None)
    if theirs == steps_per_epoch:
        return progress
    if ranks not in (None, distributed.world_size()):
        raise UsageError(
            f"{path} was made on {ranks} ranks, with epochs of {theirs} steps; on {distributed.world_size()} they have "
            f"{steps_per_epoch}: choose --batch_size and --update_freq so that their product with the ranks stays"
        )
    if progress["step"] % theirs:
        raise UsageError(
            f"{path} is in the middle of an epoch of {theirs} steps, this run's epochs have {steps_per_epoch}: "
            "resume with the same data, --batch_size, --update_freq and number of ranks"
        )
    kept = {name: value for name, value in progress.items() if name not in ("sums", "counts")}  # of an epoch that ended
    return kept | {"step": progress["step"] // theirs * steps_per_epoch}


def load_model(model: nn.Module, state: dict[str, torch.Tensor], path: Path) -> None:
    """Strict, with a short message.

    Raises:
        UsageError: names or shapes differ.
    """
    own = model.state_dict()
    for name, tensor in own.items():
        if name not in state:
            raise UsageError(f"{path}: the checkpoint of another model, it has no {name}")
        if state[name].shape != tensor.shape:
            shapes = f"{tuple(state[name].shape)}, this model has {tuple(tensor.shape)}"
            raise UsageError(f"{path}: the checkpoint of another model, its {name} is {shapes}")
    unknown = sorted(set(state) - set(own))
    if unknown:
        raise UsageError(f"{path}: the checkpoint of another model, {unknown[0]} in it has no place here")
    load = shards.load_whole_model if any(map(shards.is_sharded, own.values())) else nn.Module.load_state_dict
    load(model, state)


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any], path: Path) -> None:
    """Moments and steps of the file; what the update is (betas, decay, fused or not) stays this run's.

    Raises:
        UsageError: groups of other sizes, or another optimizer's.
    """
    groups = []
    try:
        for group, own in zip(state["param_groups"], optimizer.param_groups, strict=False):
            other = [name for name in ("betas", "momentum", "alpha", "rho") if (name in group) != (name in own)]
            if other:
                raise ValueError(f"it is another optimizer's ({', '.join(other)} is in one of the two only)")
            kept = {name: value for name, value in own.items() if name != "params"}
            groups.append({**group, **kept, "lr": float(group["lr"])})
        if len(state["param_groups"]) != len(optimizer.param_groups):
            raise ValueError(f"{len(state['param_groups'])} groups, this run has {len(optimizer.param_groups)}")
        shards.load_whole_optimizer(optimizer, {**state, "param_groups": groups})
    except ValueError as error:
        raise UsageError(f"{path}: its optimizer state does not fit this model: {error}") from error


def open_log(options: argparse.Namespace, world: World, last: int, continued: bool, precision: str) -> RunLog:
    """The log of a run that ends at step `last`."""
    return RunLog(
        options.output_dir, world, NETWORK, options.batch_size, options.case_kind, last, options.log_every,
        resume=continued, profile=options.profile, precision=precision, tensorboard_dir=tensorboard_dir(options, world),
    )  # fmt: skip


def open_evaluation_log(options: argparse.Namespace, world: World, kind: str = "eval") -> RunLog:
    """The log of an evaluation alone, which has a result file of its own beside that of the training."""
    name = f"{NETWORK}_{kind}"
    return RunLog(
        options.output_dir, world, name, options.batch_size, options.case_kind, evaluation=True,
        tensorboard_dir=tensorboard_dir(options, world),
    )  # fmt: skip


def tensorboard_dir(options: argparse.Namespace, world: World) -> str | None:
    """--log_dir, which is there before the run moves an earlier one's files aside.

    Raises:
        UsageError: it cannot be made.
    """
    if options.log_dir and world.is_main:
        try:
            os.makedirs(options.log_dir, exist_ok=True)
        except OSError as error:
            message = f"--log_dir {options.log_dir}: cannot be written ({error.strerror}); name another folder"
            raise UsageError(message) from error
    return options.log_dir


def append_epoch_log(output_dir: str | Path, line: dict[str, Any]) -> None:
    """One JSON line in log.txt; a line of the same or a later epoch (a resumed run's past) is replaced."""
    path = Path(output_dir) / "log.txt"
    lines = []
    if path.exists():
        lines = [text for text in path.read_text().splitlines() if json.loads(text)["epoch"] < line["epoch"]]
    whole = path.with_name(".log.txt.tmp")  # a run that is killed here leaves the old file
    whole.write_text("\n".join([*lines, json.dumps(line)]) + "\n")
    whole.replace(path)
