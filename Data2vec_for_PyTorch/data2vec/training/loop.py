"""The loop over epochs and updates that pretraining and fine-tuning share: when to log, evaluate, save and stop."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from common import device as devices
from common import distributed
from common.distributed import World
from common.errors import Preempted, UsageError
from common.run import replay
from common.run.result_file import keep_aside
from common.run_log import RunLog
from data2vec.data.epochs import SplitBatches
from data2vec.modality import flops_of
from data2vec.training.checkpoint import save_checkpoints
from data2vec.training.update import Run, accumulate_gradients, ema_decay, train_update


@dataclass
class Training(Run):
    """A run, its data, where it reports and saves, and the number of updates at which it ends.

    `report` is a `Report` or a `FineTuningReport`. `evaluate` is a function of (run, epoch, split) that returns what
    the best checkpoint has the least of, or None where the run was asked to stop meanwhile.
    """

    data: SplitBatches
    report: Any
    save_dir: Path
    limit: int
    evaluate: Callable[[Training, int, str], float | None]
    compiles: bool = False


def batch_size(config: DictConfig) -> int:
    """As the result file's name has it: of samples, or where batches are of a length, of tokens."""
    return config.dataset.batch_size or config.dataset.max_tokens


def update_limit(config: DictConfig, options: argparse.Namespace) -> int:
    return min(config.optimization.max_update, options.max_steps or config.optimization.max_update)


def open_log(
    network: str,
    options: argparse.Namespace,
    config: DictConfig,
    world: World,
    fps_unit: str,
    resume: bool,
    precision: str,
) -> RunLog:
    """The run's log, to be entered; says what begins."""
    if world.is_main:
        unit = "samples" if config.dataset.batch_size else "tokens"
        print(
            f"{'resuming' if resume else 'starting'}: {config.model._name}, data {config.task.data}, "
            f"{update_limit(config, options)} updates, {batch_size(config)} {unit} a batch, {precision} on "
            f"{world.size} x {devices.describe(world.device)}",
            flush=True,
        )
    return RunLog(
        options.output_dir,
        world,
        network,
        batch_size(config),
        options.case_kind,
        total_steps=update_limit(config, options),
        log_every=config.common.log_interval,
        resume=resume,
        fps_unit=fps_unit,
        profile=options.profile,
        precision=precision,
    )


def begin(log: RunLog, save_dir: Path, notes: list[str | None]) -> None:
    """Keeps an earlier run's checkpoints aside where this one does not go on from them, and tells the notes."""
    if log.world.is_main and not log.resume and save_dir.resolve() != log.folder.resolve():
        keep_aside(save_dir)  # where it is not checkpoints/, which the log has moved
    for text in notes:
        if text:
            log.info(text)


def replay_update(
    network: str, run: Run, data: SplitBatches, options: argparse.Namespace, notes: list[str | None]
) -> None:
    """--replay: the recorded update once more on the weights that the run would go on from."""
    limit, state = update_limit(run.config, options), run.state
    recorded = replay.read(options.replay, limit, place=("epoch", "iterations"))
    state.num_updates = recorded.step - 1
    state.epoch, state.iterations = recorded.place["epoch"], recorded.place["iterations"]
    loader = data.train_batches(state.epoch, state.iterations).loader(run.config.dataset.num_workers)
    batches = [batch.to(run.world.device) for batch in islice(loader, run.config.optimization.update_freq[0])]
    if not batches:
        raise UsageError(f"--replay {recorded.path}: epoch {state.epoch} has no batch {state.iterations} here")
    decay = ema_decay(run.config, state.num_updates)
    with RunLog(
        options.output_dir, run.world, f"{network}_replay", batch_size(run.config), options.case_kind, evaluation=True
    ) as log:
        for text in notes:
            if text:
                log.info(text)
        replay.run(recorded, log, state.model, state.step, lambda: accumulate_gradients(run, batches, decay)[0])


def train(run: Training) -> None:
    """Epochs until `run.limit` updates (or optimization.max_epoch, or stop_time_hours)."""
    state, options = run.state, run.config.optimization
    stop = is_complete(run)
    if state.evaluation_due:
        validate_and_save(run, state.iterations == 0, stop)
    while not stop:
        epoch = state.epoch
        run.report.updates_per_epoch = -(-run.data.batches_per_epoch(epoch) // options.update_freq[0])
        epoch_batches = run.data.train_batches(epoch, state.iterations)
        loader, rows = epoch_batches.loader(run.config.dataset.num_workers), iter(epoch_batches.rows)
        while not stop:
            with run.report.log.data_wait():
                batches = [batch.to(run.world.device) for batch in islice(loader, options.update_freq[0])]
            if not batches:
                break
            began = time.perf_counter()
            result = train_update(run, batches)
            if run.compiles:
                tell_first_update(run, began)
            seconds, samples = time.perf_counter() - began, sum(islice(rows, len(batches)))
            flops = sum(flops_of(state.model, batch) for batch in batches) * run.world.size  # ranks are about alike
            run.report.update(state, result, seconds, samples, flops)
            ended = state.iterations >= run.data.batches_per_epoch(epoch)
            if ended:
                state.epoch, state.iterations = epoch + 1, 0
            stop = is_complete(run) or is_out_of_time(run)
            validate_and_save(run, ended, stop)
            if not stop and run.report.log.preempted():
                run.report.read(state)
                save(run, None, ended)
                raise stopped(run, ended)
            if ended:
                break
        run.report.end_of_epoch(state, epoch)


def tell_first_update(run: Training, began: float) -> None:
    devices.synchronize(run.world.device)
    seconds = time.perf_counter() - began
    run.report.log.info(f"first step: {seconds:.1f} s, in which torch.compile made the blocks' code")
    run.compiles = False


def is_complete(run: Training) -> bool:
    return run.state.num_updates >= run.limit or 0 < run.config.optimization.max_epoch < run.state.epoch


def is_out_of_time(run: Training) -> bool:
    hours = run.config.optimization.stop_time_hours
    return hours > 0 and distributed.broadcast_object(run.state.seconds() > 3600 * hours)


def validate_and_save(run: Training, ended: bool, stop: bool) -> None:
    """Validates and saves where fairseq would: at intervals of updates, at epochs' ends, and at the run's end.

    Args:
        ended: an epoch has just ended.
        stop: the run has.

    Raises:
        Preempted: asked to stop meanwhile. The checkpoint is written; the continued run begins with this evaluation.
    """
    options, dataset, state = run.config.checkpoint, run.config.dataset, run.state
    epoch = state.epoch - ended

    def due(interval: int, count: int) -> bool:
        return interval > 0 and count > 0 and count % interval == 0

    saves = (
        stop or due(options.save_interval_updates, state.num_updates) or (ended and due(options.save_interval, epoch))
    )
    validates = stop or (saves and not ended) or (ended and due(dataset.validate_interval, epoch))
    validates |= due(dataset.validate_interval_updates, state.num_updates) or state.evaluation_due
    validates &= not dataset.disable_validation and state.num_updates >= dataset.validate_after_updates
    if validates or saves:
        run.report.read(state)  # raises before a broken model is saved
    losses = [run.evaluate(run, epoch, name) for name in dataset.valid_subset.split(",")] if validates else []
    state.evaluation_due = None in losses
    if saves or state.evaluation_due:
        save(run, losses[0] if losses and not state.evaluation_due else None, ended)
    if state.evaluation_due:
        raise stopped(run, ended)


def stopped(run: Training, ended: bool) -> Preempted:
    """What to raise on a signal, once everything is saved; an epoch that has just ended gets its line before."""
    if ended:
        run.report.end_of_epoch(run.state, run.state.epoch - 1)
    return run.report.log.stopped(run.state.num_updates, saved=not run.config.checkpoint.no_save)


def save(run: Training, loss: float | None, ended: bool) -> None:
    """The checkpoints that are due, by the main rank; the others wait until their content is copied."""
    state = run.state
    if run.config.checkpoint.no_save:
        return
    state.meters = {} if ended else run.report.meters()
    with run.report.log.pause("save"):
        save_checkpoints(run.save_dir, state, run.config, loss, ended, run.report.log.writer, run.world)
        distributed.barrier()
