"""Which checkpoint to go on from, whether it is whole, whether this run is the same one; the best model so far.

A checkpoint is written into `.saving/`, reaches the disk, is marked and only then gets its name: under that name there
is never half of one, and an older one goes when the newer one is there.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from common import distributed
from common.errors import UsageError

STAGING = ".saving"  # in the output folder
MARK = "complete.json"  # written last into a checkpoint folder
# what `Trainer` and evaluation write beside the log's files
OF_EVALUATION = ("eval_results.json", "retrieval.png")
OF_TRAINING = (
    *OF_EVALUATION,
    *("best", "model*.safetensors*", "config.json", "processor_config.json", "preprocessor_config.json"),
    *("tokenizer*.json", "special_tokens_map.json", "vocab.json", "merges.txt", "training_args.bin"),
    *("all_results.json", "train_results.json", "trainer_state.json"),
)


def publish(output_dir: Path, step: int, facts: dict[str, Any], keep: int | None) -> None:
    """Gives the checkpoint in the staging folder its name, then removes all but the newest `keep`."""
    staged = output_dir / STAGING / f"checkpoint-{step}"
    mark_complete(staged, facts)
    folder = output_dir / staged.name
    earlier = output_dir / STAGING / f"earlier-{step}"
    if folder.exists():  # of this step: damaged, or of a run that was resumed from before it
        folder.rename(earlier)
    staged.rename(folder)
    _sync(output_dir)
    remove_leftovers(output_dir)
    for _, old in numbered(output_dir)[:-keep] if keep else ():
        shutil.rmtree(old)


def remove_leftovers(output_dir: str | Path) -> None:
    """What a run left that was killed while it saved; nothing else has that name."""
    shutil.rmtree(Path(output_dir) / STAGING, ignore_errors=True)


def mark_complete(folder: Path, facts: dict[str, Any]) -> None:
    """Everything in the folder reaches the disk, then the mark does."""
    for path in folder.iterdir():
        _sync(path)
    partial = folder / f".{MARK}"
    partial.write_text(json.dumps(facts))
    _sync(partial)
    os.replace(partial, folder / MARK)
    _sync(folder)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def newest_checkpoint(output_dir: str | Path) -> Path | None:
    """The whole checkpoint with the highest step, or None. Damaged ones are passed over with a warning."""
    for _, folder in reversed(numbered(output_dir)):
        problem = damage(folder)
        if problem is None:
            return folder
        warnings.warn(f"{folder}: {problem}; an older checkpoint is used", stacklevel=2)
    return None


def numbered(output_dir: str | Path) -> list[tuple[int, Path]]:
    """(step, folder) of all checkpoints, the newest last."""
    found = [(re.fullmatch(r"checkpoint-(\d+)", p.name), p) for p in Path(output_dir).glob("checkpoint-*")]
    return sorted((int(match[1]), path) for match, path in found if match)


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint folder, None when it can be resumed from."""
    if not (folder / "trainer_state.json").is_file():
        return "not a training checkpoint (no trainer_state.json)"
    if not (folder / MARK).is_file():
        return "cut short while it was being written"
    try:
        with safe_open(folder / "model.safetensors", "pt") as weights:
            weights.keys()
    except (OSError, SafetensorError) as error:
        return f"model.safetensors cannot be read ({error})"
    return None if (folder / "optimizer.pt").is_file() else "optimizer.pt is missing"


def agree(output_dir: str | Path, wanted: str | None, overwrite: bool, facts: dict[str, Any]) -> Path | None:
    """As `choose`, on every rank: the main one looks, and all of them must see what it chose.

    Raises:
        UsageError: on all ranks; also when a rank does not see the checkpoint, which is on another host's disk then.
    """
    answer: tuple[Path | None, str | None] = (None, None)
    if distributed.rank() == 0:
        try:
            answer = choose(output_dir, wanted, overwrite, facts), None
        except UsageError as error:
            answer = None, error.message
    folder, problem = distributed.broadcast_object(answer)
    if problem:
        raise UsageError(problem)
    if folder is not None:
        blind = [rank for rank, sees in enumerate(distributed.gather_objects((folder / MARK).is_file())) if not sees]
        if blind:
            raise UsageError(
                f"{folder}: rank {', '.join(map(str, blind))} does not see this checkpoint: --output_dir must be on a "
                "disk that all hosts share"
            )
    return folder


def choose(output_dir: str | Path, wanted: str | None, overwrite: bool, facts: dict[str, Any]) -> Path | None:
    """The checkpoint to resume from: `wanted`, or with "auto" or nothing the newest of `output_dir`.

    Args:
        wanted: a folder, "auto", or None.
        overwrite: start afresh whatever `output_dir` holds (the old files are kept in `earlier/`).
        facts: of this run, see `check_same_run`.

    Raises:
        UsageError: `wanted` cannot be resumed from, or belongs to a different run.
    """
    if wanted in (None, "auto"):
        folder = None if overwrite and wanted is None else newest_checkpoint(output_dir)
    else:
        folder = Path(wanted)
        problem = damage(folder) if folder.is_dir() else "no such folder"
        if problem:
            raise UsageError(f"--resume {folder}: {problem}")
    if folder is not None:
        check_same_run(folder, facts)
    return folder


def check_same_run(folder: Path, facts: dict[str, Any]) -> None:
    """Refuses a run whose batches would be others than those the checkpoint counted."""
    stored = json.loads((folder / MARK).read_text())
    different = {key: (stored[key], facts[key]) for key in facts if key in stored and stored[key] != facts[key]}
    if different:
        listed = ", ".join(f"{key} was {old}, is {new}" for key, (old, new) in different.items())
        raise UsageError(
            f"{folder}: cannot be resumed exactly: {listed}. Use the same values, or start anew from its weights with "
            f"--model_name_or_path {folder} --overwrite_output_dir"
        )


def keep_best(trainer, eval_loss: float) -> None:
    """Saves the model to output_dir/best when its evaluation loss is the lowest of the run."""
    folder = Path(trainer.args.output_dir) / "best"
    record = folder / "best.json"
    if record.is_file() and json.loads(record.read_text())["eval_loss"] <= eval_loss:
        return
    staging = folder.with_name(".best.saving")
    shutil.rmtree(staging, ignore_errors=True)
    trainer.save_model(str(staging), _internal_call=True)
    (staging / record.name).write_text(json.dumps({"eval_loss": eval_loss, "step": trainer.state.global_step}))
    shutil.rmtree(folder, ignore_errors=True)
    staging.rename(folder)


def prepare_folder(output_dir: str | Path, checkpoint: Path | None, trains: bool) -> None:
    """Before the first file is written: leftovers go, and an earlier run's files aside unless it is continued."""
    if trains:
        remove_leftovers(output_dir)
    if checkpoint is None:
        set_aside(output_dir, OF_TRAINING if trains else OF_EVALUATION)


def set_aside(output_dir: str | Path, names: Sequence[str]) -> None:
    """Moves these files of an earlier run to `earlier/<time>/`: a fresh run must not overwrite them."""
    output_dir = Path(output_dir)
    found = [path for name in names for path in output_dir.glob(name)]
    if not found:
        return
    aside = output_dir / "earlier" / time.strftime("%Y%m%d-%H%M%S")
    while aside.exists():
        aside = aside.with_name(aside.name + "x")
    aside.mkdir(parents=True)
    for path in found:
        path.rename(aside / path.name)
