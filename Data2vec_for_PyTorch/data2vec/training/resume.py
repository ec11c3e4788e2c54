"""Which checkpoint a run goes on from, and whether it is one of this run."""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from common import checkpoint_file, distributed
from common.checkpoint_file import CheckpointError
from common.distributed import World
from common.errors import UsageError
from common.run import run_folder
from data2vec.config.keys import Key, options_of
from data2vec.data.epochs import SplitBatches
from data2vec.training.checkpoint import load_training_state
from data2vec.training.update import TrainState

LAST = "checkpoint_last.pt"
# what decides the numbers of a run; ranks and update_freq are fitted to one another by load_training_state
_OF_THE_RUN = ("task.", "model.", "optimizer.", "lr_scheduler.", "optimization.lr", "optimization.max_update")
_OF_THE_RUN += ("optimization.clip_norm", "common.seed", "dataset.max_tokens", "dataset.batch_size")
_OF_THE_RUN += ("dataset.required_batch_size_multiple", "dataset.train_subset")
# places (what is there goes into the data's identity), and memory: no number changes
_NOT_OF_THE_RUN = ("task.data", "task.encoder_json", "task.vocab_bpe", "task.dict")
_NOT_OF_THE_RUN += ("model.transformer.checkpoint_activations", "model.checkpoint_activations")
# changed on purpose: rates and length; where the teacher's decay ends follows from the length
MAY_CHANGE = ("settings.optimization", "settings.lr_scheduler", "settings.model.ema_anneal_end_step")


def checkpoint_to_resume(config: DictConfig, save_dir: Path, world: World) -> Path | None:
    """The file to go on from: by default this run's newest whole one, if there is one; else the file that is named.

    Raises:
        UsageError: on all ranks. There is no file of that name, all of this run's are damaged, or hosts differ.
    """
    name = config.checkpoint.restore_file
    if name in (None, "none", ""):
        return None
    if name != LAST:
        found, problem = Path(name), None if Path(name).is_file() else "no such file"
    else:
        found, problem = _newest_whole(save_dir) if world.is_main else (None, None)
    if problem := distributed.broadcast_object(problem):
        raise UsageError(f"checkpoint.restore_file={name}: {problem}")
    return run_folder.agree_on(found, world)


def _newest_whole(save_dir: Path) -> tuple[Path | None, str | None]:
    """(file, problem): checkpoint_last.pt, or where that is damaged the one of most updates there, with a warning."""
    path = save_dir / LAST
    others = [p for p in save_dir.glob("checkpoint*.pt") if p.name != LAST]
    if not path.exists() and not others:
        return None, None
    problem = _problem(path) if path.exists() else "no such file"
    if problem is None:
        return path, None
    whole = [p for p in others if _problem(p) is None]
    if not whole:
        return None, f"{path}: {problem}, and no other checkpoint there is whole; --resume none begins anew"
    path_before = max(whole, key=_updates_of)
    warnings.warn(f"{path}: {problem}; going on from {path_before}, the newest whole checkpoint", stacklevel=2)
    return path_before, None


def _problem(path: Path) -> str | None:
    try:
        content = checkpoint_file.load(path, mmap=True)
    except CheckpointError as error:
        return str(error).removeprefix(f"{path}: ")
    return None if isinstance(content, dict) and "model" in content else "holds no model's weights"


def _updates_of(path: Path) -> int:
    history = checkpoint_file.load(path, mmap=True).get("optimizer_history") or [{}]
    return int(history[-1].get("num_updates", 0))


def settings_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """Of a run's (or a checkpoint's) configuration what decides its numbers, by group and name."""
    options = options_of(*((config.get(group) or {}).get("_name") for group in ("task", "model")))
    settings = OmegaConf.create()
    for key, option in options.items():
        group, _, rest = key.partition(".")
        value: Any = config.get(group)
        for part in rest.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        if isinstance(option, Key) and value is not None and key.startswith(_OF_THE_RUN) and key not in _NOT_OF_THE_RUN:
            OmegaConf.update(settings, key, value if isinstance(value, str | int | float | list) else str(value))
    return OmegaConf.to_container(settings)


def identity_of(config: DictConfig, data: SplitBatches, precision: str) -> dict[str, Any]:
    """What a run is, in plain values: kept with each checkpoint, compared when one is continued."""
    settings = settings_of(OmegaConf.to_container(config))
    return {"settings": settings, "data": data.identity(), "precision": precision}


def go_on_or_begin(
    state: TrainState, config: DictConfig, data: SplitBatches, precision: str, world: World, options: argparse.Namespace
) -> tuple[Path, bool, str | None]:
    """Restores the newest whole checkpoint into `state`, if there is one to go on from.

    Returns:
        The checkpoints' folder, whether the run goes on in it, and what was restored in words; None for a new run.
    """
    save_dir = Path(options.output_dir) / config.checkpoint.save_dir
    state.identity = identity_of(config, data, precision)
    checkpoint = checkpoint_to_resume(config, save_dir, world)
    if checkpoint is None:
        return save_dir, False, None
    note = resume(state, config, checkpoint, data, options.accept_changes)
    return save_dir, checkpoint.resolve().parent == save_dir.resolve(), note


def resume(state: TrainState, config: DictConfig, path: Path, data: SplitBatches, accepted: str = "") -> str:
    """Loads the checkpoint to go on from.

    Args:
        accepted: names of differences that the user accepts, with commas between.

    Returns:
        What happened, in words.

    Raises:
        UsageError: it is damaged, of another run or another place in the data.
    """
    try:
        checkpoint = checkpoint_file.load(path)
        changes = _compare(checkpoint, path, state, config, accepted)
        words = load_training_state(state, checkpoint, path, config)
    except CheckpointError as error:
        raise UsageError(str(error)) from None
    batches = data.batches_per_epoch(state.epoch)
    if state.iterations >= batches:
        raise UsageError(
            f"{path}: it was saved after {state.iterations} batches of an epoch, which has {batches} here: is it "
            "another corpus, or another dataset.max_tokens? Go on with the same, or begin the epochs anew with "
            "checkpoint.reset_dataloader=true"
        )
    changes = f"; {changes}" if changes else ""
    return f"resumed {path}: epoch {state.epoch}, update {state.num_updates}{words}{changes}"


def _compare(checkpoint: Any, path: Path, state: TrainState, config: DictConfig, accepted: str) -> str | None:
    """`run_folder.compare`, without what the user resets; fairseq's checkpoints tell their settings, too."""
    if not isinstance(checkpoint, dict):
        return None  # refused in other words when it is loaded
    saved = (checkpoint.get("extra_state") or {}).get("identity")
    if saved is None and isinstance(checkpoint.get("cfg"), dict):
        saved = {"settings": settings_of(checkpoint["cfg"])}
    current = dict(state.identity)
    groups = dict(current["settings"])
    if config.checkpoint.reset_dataloader:
        current.pop("data")
        groups.pop("dataset")
    if config.checkpoint.reset_optimizer:
        groups.pop("optimizer")
    return run_folder.compare(path, saved, {**current, "settings": groups}, may_change=MAY_CHANGE, accepted=accepted)
