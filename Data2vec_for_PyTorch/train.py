"""data2vec pretraining, on a binarized corpus or on pictures.

    python train.py --config-dir configs/text/pretraining --config-name base task.data=DIR \
        distributed_training.distributed_world_size=1 optimization.max_update=1000

    python train.py --config-dir configs/vision/pretraining --config-name base_imagenet task.data=DIR

Options are those of fairseq-hydra-train: a YAML file and dotted overrides. The run goes on from
`checkpoint.restore_file` (checkpoint_last.pt) when there is one.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from omegaconf import DictConfig

from common import device as devices
from common import distributed, replay
from common.checkpoint_file import CheckpointError, load
from common.errors import UsageError, print_usage_errors
from common.result_file import keep_aside
from common.run_log import RunLog
from data2vec import device_patches, npu_patches
from data2vec.command_line import choose_precision, parse, start_ranks
from data2vec.data.epochs import SplitBatches
from data2vec.modality import build, forward_of, fps_unit, is_vision, open_data
from data2vec.training.checkpoint import save_checkpoints
from data2vec.training.report import Report
from data2vec.training.resume import checkpoint_to_resume, identity_of, resume
from data2vec.training.update import (
    Run,
    TrainState,
    accumulate_gradients,
    ema_decay,
    make_state,
    train_update,
    validate,
)
from data2vec.weights.huggingface import load_huggingface
from data2vec.weights.pretrained import load_weights
from data2vec.weights.vision_weights import load_huggingface_vision


@dataclass
class Pretraining(Run):
    """A run, its data, where it reports and saves, and the number of updates at which it ends."""

    data: SplitBatches
    report: Report
    save_dir: Path
    limit: int


@print_usage_errors
def main(argv: list[str] | None = None) -> None:
    options, config, notes = parse(argv, __doc__.splitlines()[0])
    start_ranks(config, options.device)
    with distributed.process_group(options.device) as world:
        precision, note = choose_precision(options, config, world.device)
        devices.seed_everything(config.common.seed)
        notes += [note, *npu_patches.apply_to_config(config, world.device)]
        data = open_data(config, world.rank, world.size)
        data.open_splits()
        model = build(config, data).to(world.device)
        device_patches.apply_to_model(model, world.device)
        state = make_state(model, config, precision, world)
        save_dir = Path(options.output_dir) / config.checkpoint.save_dir
        state.identity = identity_of(config, data, precision)
        checkpoint = checkpoint_to_resume(config, save_dir, world)
        if checkpoint:
            notes.append(resume(state, config, checkpoint, data, options.accept_changes))
        else:
            notes.append(weights_to_begin_with(state, config))
        if options.replay:
            run = Run(config, world, precision, forward_of(config, data, world.device), state)
            return replay_update(run, data, options, notes)
        goes_on = checkpoint is not None and checkpoint.resolve().parent == save_dir.resolve()
        limit = min(config.optimization.max_update, options.max_steps or config.optimization.max_update)
        log = RunLog(
            options.output_dir,
            world,
            "Data2vec_for_PyTorch",
            batch_size(config),
            options.case_kind,
            total_steps=limit,
            log_every=config.common.log_interval,
            resume=goes_on,
            fps_unit=fps_unit(config),
            profile=options.profile,
        )
        with log:
            if world.is_main and not goes_on and save_dir.resolve() != log.folder.resolve():
                keep_aside(save_dir)  # where it is not checkpoints/, which the log has moved
            for text in notes:
                if text:
                    log.info(text)
            report = Report(log, config, state)
            for text in data.notes:
                log.info(text)
            forward = forward_of(config, data, world.device)
            train(Pretraining(config, world, precision, forward, state, data, report, save_dir, limit))
            report.finish(state)


def weights_to_begin_with(state: TrainState, config: DictConfig) -> str | None:
    """Loads checkpoint.finetune_from_model, if it is given; returns what happened, in words."""
    if not config.checkpoint.finetune_from_model:
        return None
    weights = Path(config.checkpoint.finetune_from_model)
    load_folder = load_huggingface_vision if is_vision(config) else load_huggingface
    try:
        saved = load_folder(weights) if weights.is_dir() else load(weights)
        words = load_weights(state.model, saved, weights)
    except CheckpointError as error:
        raise UsageError(str(error)) from None
    return f"weights of {weights}{words and ': '}{words}"


def batch_size(config: DictConfig) -> int:
    """As the result file's name has it: of samples, or where batches are of a length, of tokens."""
    return config.dataset.batch_size or config.dataset.max_tokens


def replay_update(run: Run, data: SplitBatches, options: argparse.Namespace, notes: list[str | None]) -> None:
    """--replay: the recorded update once more on the weights that the run would go on from."""
    recorded, state = replay.read(options.replay, place=("epoch", "iterations")), run.state
    state.num_updates = recorded.step - 1
    state.epoch, state.iterations = recorded.place["epoch"], recorded.place["iterations"]
    loader = data.train_batches(state.epoch, state.iterations).loader(run.config.dataset.num_workers)
    batches = [batch.to(run.world.device) for batch in islice(loader, run.config.optimization.update_freq[0])]
    decay = ema_decay(run.config, state.num_updates)
    with RunLog(
        options.output_dir, run.world, "Data2vec_for_PyTorch_replay", batch_size(run.config), options.case_kind,
        evaluation=True,
    ) as log:  # fmt: skip
        for text in notes:
            if text:
                log.info(text)
        replay.run(recorded, log, state.model, state.step, lambda: accumulate_gradients(run, batches, decay)[0])


def train(run: Pretraining) -> None:
    """Epochs until `run.limit` updates (or optimization.max_epoch, or stop_time_hours)."""
    state, options = run.state, run.config.optimization
    stop = state.num_updates >= run.limit
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
            run.report.update(state, result, time.perf_counter() - began, sum(islice(rows, len(batches))))
            stop = should_stop(run)
            ended = state.iterations >= run.data.batches_per_epoch(epoch)
            if ended:
                state.epoch, state.iterations = epoch + 1, 0
                stop = stop or 0 < options.max_epoch < state.epoch
            validate_and_save(run, ended, stop)
            if not stop and run.report.log.preempted():
                run.report.read(state)
                save(run, None, ended)
                raise run.report.log.stopped(state.num_updates)
            if ended:
                break
        run.report.end_of_epoch(state, epoch)


def should_stop(run: Pretraining) -> bool:
    hours = run.config.optimization.stop_time_hours
    too_long = hours > 0 and distributed.broadcast_object(run.state.seconds() > 3600 * hours)
    return run.state.num_updates >= run.limit or too_long


def validate_and_save(run: Pretraining, ended: bool, stop: bool) -> None:
    """Validates and saves where fairseq would: at intervals of updates, at epochs' ends, and at the run's end.

    Args:
        ended: an epoch has just ended.
        stop: the run has.
    """
    options, dataset, state = run.config.checkpoint, run.config.dataset, run.state
    epoch = state.epoch - ended

    def due(interval: int, count: int) -> bool:
        return interval > 0 and count > 0 and count % interval == 0

    saves = (
        stop or due(options.save_interval_updates, state.num_updates) or (ended and due(options.save_interval, epoch))
    )
    validates = stop or (saves and not ended) or (ended and due(dataset.validate_interval, epoch))
    validates |= due(dataset.validate_interval_updates, state.num_updates)
    validates &= not dataset.disable_validation and state.num_updates >= dataset.validate_after_updates
    if validates or saves:
        run.report.read(state)  # raises before a broken model is saved
    losses = [validation_loss(run, epoch, name) for name in dataset.valid_subset.split(",")] if validates else []
    if saves:
        save(run, losses[0] if losses else None, ended)


def validation_loss(run: Pretraining, epoch: int, name: str) -> float | None:
    """Of a split; None where the run was asked to stop meanwhile."""
    with run.report.log.pause("validate"):
        began = time.perf_counter()
        sums = validate(run, run.data.valid_batches(name).loader(run.config.dataset.num_workers))
    return None if sums is None else run.report.validation(run.state, epoch, name, sums, began)


def save(run: Pretraining, loss: float | None, ended: bool) -> None:
    """The checkpoints that are due, by the main rank; the others wait."""
    state = run.state
    if run.config.checkpoint.no_save:
        return
    state.meters = {} if ended else run.report.meters()
    with run.report.log.pause("save"):
        if run.world.is_main:
            save_checkpoints(run.save_dir, state, run.config, loss, ended)
        state.best_loss = distributed.broadcast_object(state.best_loss)
        distributed.barrier()


if __name__ == "__main__":
    main()
