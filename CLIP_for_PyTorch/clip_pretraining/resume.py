"""Which checkpoint to go on from, whether it is whole, whether this run is the same one; the best model so far.

A checkpoint is written into `.checkpoint.saving/`, reaches the disk, is sealed with the digests of its files and only
then gets its name: under that name there is never half of one, and an older one goes when the newer one is there.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from common import checkpoint_file
from common.checkpoint import digests
from common.distributed import World, broadcast_object
from common.errors import UsageError
from common.run import folder_lock, result_file, run_folder

STAGING = ".checkpoint.saving"  # in the output folder; run_folder.tidy removes what a killed run left there
CHECKPOINTS = "checkpoint-[0-9]*"
MARK = "complete.json"  # of what the checkpoint is
# named when they change, but a user changes them on purpose
MAY_CHANGE = ("schedule", "ranks")
FIXED = ("model", "frozen", "lora", "loss", "optim")  # tensors of the weights or of the optimizer
# what `Trainer` and evaluation write beside the log's files
OF_EVALUATION = ("eval_results.json", "retrieval.png")
OF_TRAINING = (
    *OF_EVALUATION,
    *("best", "model*.safetensors*", "config.json", "processor_config.json", "preprocessor_config.json"),
    *("tokenizer*.json", "special_tokens_map.json", "vocab.json", "merges.txt", "training_args.bin"),
    *("all_results.json", "train_results.json", "trainer_state.json"),
)


def publish(output_dir: Path, step: int, facts: Mapping[str, Any], keep: int | None) -> None:
    """Gives the checkpoint in the staging folder its name, then removes all but the newest `keep`."""
    staged = output_dir / STAGING / f"checkpoint-{step}"
    mark_complete(staged, facts)
    folder = output_dir / staged.name
    if folder.exists():  # of this step: damaged, or of a run that was resumed from before it
        os.replace(folder, output_dir / STAGING / f"earlier-{step}")
    os.replace(staged, folder)
    digests.sync(output_dir)
    shutil.rmtree(output_dir / STAGING, ignore_errors=True)
    checkpoint_file.keep_newest(output_dir, keep or 0, CHECKPOINTS)


def mark_complete(folder: Path, facts: Mapping[str, Any]) -> None:
    """Writes what the checkpoint is of, then seals the folder."""
    (folder / MARK).write_text(json.dumps(facts), encoding="utf-8")
    digests.seal(folder)


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint folder, None when it can be resumed from."""
    if not (folder / "trainer_state.json").is_file():
        return "not a training checkpoint (no trainer_state.json)"
    missing = [n for n in (MARK, "optimizer.pt", "scheduler.pt") if not (folder / n).is_file()]
    return digests.damage(folder) or (f"{missing[0]} is missing" if missing else None)


def agree(
    output_dir: str | Path, wanted: str | None, overwrite: bool, facts: Mapping[str, Any], accepted: str, world: World
) -> tuple[Path | None, str | None]:
    """(the checkpoint to go on from or None, what has changed on purpose in words), the same on all ranks.

    Args:
        wanted: a folder, "auto", or None: the newest whole one of `output_dir`.
        overwrite: with None, start afresh whatever `output_dir` holds (the old files are kept in `earlier/`).
        facts: of this run.
        accepted: names of facts that may differ all the same, of --accept_changes.

    Raises:
        UsageError: on all ranks: `wanted` cannot be resumed from, or belongs to another run, or a host lacks it.
    """
    folder, changed, problem = None, None, None
    if world.is_main:
        try:
            folder = choose(output_dir, wanted, overwrite)
            if folder is not None:
                saved = json.loads((folder / MARK).read_text(encoding="utf-8"))
                changed = run_folder.compare(
                    folder, saved, facts, may_change=MAY_CHANGE, accepted=accepted, fixed=FIXED
                )
        except UsageError as error:
            problem = error.message
    problem, changed = broadcast_object((problem, changed))
    if problem:
        raise UsageError(problem)
    return run_folder.agree_on(folder, world), changed


def choose(output_dir: str | Path, wanted: str | None, overwrite: bool) -> Path | None:
    """See `agree`. Damaged checkpoints are passed over with a warning; one that is asked for by name is an error."""
    if wanted in (None, "auto"):
        if overwrite and wanted is None:
            return None
        return checkpoint_file.newest(output_dir, CHECKPOINTS)
    folder = Path(wanted)
    problem = damage(folder) if folder.is_dir() else "no such folder"
    if problem:
        raise UsageError(f"--resume {folder}: {problem}")
    return folder


def keep_best(trainer, eval_loss: float) -> None:
    """Saves the model to output_dir/best when its evaluation loss is the lowest of the run. All ranks call it."""
    folder = Path(trainer.args.output_dir) / "best"
    record = folder / "best.json"
    trainer.run_log.writer.wait()  # for the best before it
    known = trainer.world.is_main and record.is_file()
    if broadcast_object(known and json.loads(record.read_text())["eval_loss"] <= eval_loss):
        return
    staging = folder.with_name(".best.saving")
    if trainer.world.is_main:
        shutil.rmtree(staging, ignore_errors=True)
    content = json.dumps({"eval_loss": eval_loss, "step": trainer.state.global_step})

    def publish_best() -> None:
        (staging / record.name).write_text(content)
        shutil.rmtree(folder, ignore_errors=True)
        staging.rename(folder)

    trainer.save_behind(staging, publish_best)


def prepare_folder(output_dir: str | Path, checkpoint: Path | None, trains: bool) -> None:
    """Files of an earlier run go aside unless they are continued. The folder must be this run's already.

    Beside a training that lives an evaluation moves nothing. Of checkpoints those newer than the one that is gone on
    from go aside: they are of a future that will be different.
    """
    if trains and checkpoint is not None and checkpoint.parent == Path(output_dir):
        checkpoint_file.set_aside_newer(checkpoint, CHECKPOINTS)
    if checkpoint is None and (trains or folder_lock.living_owner(output_dir) is None):
        result_file.keep_aside(Path(output_dir), OF_TRAINING if trains else OF_EVALUATION)
