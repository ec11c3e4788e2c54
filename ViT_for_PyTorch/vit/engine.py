"""Training of a configured run, in the order in which it happens."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common import checkpoint_file, shards
from common import device as devices
from common.distributed import all_reduce_mean, gather_objects, process_group
from common.run import replay
from common.run.preemption import until_asked
from common.run.progress import bar
from common.run_log import RunLog
from common.update import gradients_stay_local
from vit.config import run_config as configuration
from vit.config.description import config_of_run
from vit.config.run_config import Config
from vit.data.loader import Batch, to_model_input
from vit.data.mixup import apply_mix, draw_mix
from vit.evaluation import NETWORK
from vit.preparation import Run, build, local_checkpoint, prepare, resume, to_resume
from vit.training import checkpoint
from vit.training.checkpoint import RunShape
from vit.training.data import open_training_data, training_batches
from vit.training.evaluate import Score, evaluate_model
from vit.training.metrics import soft_target_cross_entropy
from vit.training.optim import set_learning_rate
from vit.training.schedule import learning_rate_at, scaled_lr
from vit.weights.labels import save_class_names


def train(config: Config) -> dict[str, Any]:
    """Trains, fine-tunes or resumes as configured; returns the keys of the result file."""
    with process_group(config.device) as world:
        devices.seed_everything(config.seed)
        resumed_from, config = to_resume(config, world)
        weights = local_checkpoint(config.load_checkpoint, world) if config.load_checkpoint else None
        description = config_of_run(config, weights, training=True)
        data = open_training_data(config, description, world)
        model = build(config, replace(description, num_classes=len(data.class_names)), weights, world, head="new")
        run = prepare(config, world, data, model)
        if resumed_from is not None:
            resume(run, resumed_from)
        if config.replay:
            return replay_step(run, resumed_from)
        with open_log(run, resumed_from) as log:
            batches = training_batches(data.training, config.accumulate, run.state.step)
            score = evaluate_if_due(run, log)  # what a stop has interrupted
            for step in range(run.state.step, run.total_steps):
                if is_stale(run):
                    log.info(f"early stop: {run.state.stale} evaluations without a better {config.metric_for_best}")
                    break
                epoch = step / run.shape.steps_per_epoch
                lr = learning_rate(config, run.shape, epoch)
                set_learning_rate(run.optimizer, lr)
                loss = forward_backward(run, step, batches, log)
                norm, _ = run.update(step + 1, loss)
                log.step(step + 1, run.shape.global_batch, all_reduce_mean(loss), lr, norm, epoch, run.flops)
                run.state.step = step + 1
                if is_due(run, config.log_every):
                    run.update.check()
                if log.preempted() and run.state.step < run.total_steps:
                    save(run, log)
                    raise log.stopped(run.state.step)
                score = evaluate_if_due(run, log) or score  # before saving: the checkpoint knows the best score so far
                if is_due(run, config.save_every or run.shape.steps_per_epoch):
                    save(run, log)
            return finish(run, log, score)


def open_log(run: Run, resumed_from: Path | None) -> RunLog:
    """The run's log; a fresh run moves the files of an earlier one in the same folder aside."""
    config = run.config
    if run.world.is_main:
        where = f"resuming from step {run.state.step} ({resumed_from})" if resumed_from else "starting"
        print(
            f"{where}: {config.model.name}, {len(run.data.training.folder)} pictures, {run.shape.num_classes} classes, "
            f"{run.total_steps} steps of {run.shape.global_batch}, {config.precision} on "
            f"{run.world.size} x {devices.describe(run.world.device)}",
            flush=True,
        )
    return RunLog(
        config.output_dir,
        run.world,
        NETWORK,
        config.batch_size,
        config.case_kind,
        total_steps=run.total_steps,
        log_every=config.log_every,
        resume=resumed_from is not None,
        needs_shared=config.parallel == "fsdp",
        profile=config.profile,
        precision=config.precision,
    )


def replay_step(run: Run, source: Path | None) -> dict[str, Any]:
    """The step of a replay.json once more, on the weights of the checkpoint `source` or those a run begins with."""
    config, recorded = run.config, replay.read(run.config.replay, run.total_steps)
    step = recorded.step - 1
    batches = training_batches(run.data.training, config.accumulate, step)
    with RunLog(
        config.output_dir, run.world, f"{NETWORK}_replay", config.batch_size, config.case_kind, evaluation=True
    ) as log:
        log.info(f"weights: {source or 'those that a run begins with'}; {config.precision}")
        return replay.run(recorded, log, run.model, run.update, lambda: forward_backward(run, step, batches, log))


def learning_rate(config: Config, shape: RunShape, epoch: float) -> float:
    """The rate of the top layer at a fractional epoch."""
    return learning_rate_at(
        epoch,
        lr=scaled_lr(config.optimizer.base_lr, shape.global_batch),
        min_lr=config.optimizer.min_lr,
        warmup_epochs=config.optimizer.warmup_epochs,
        epochs=config.epochs,
    )


def forward_backward(run: Run, step: int, batches: Iterator[Batch], log: RunLog) -> Tensor:
    """Accumulates the gradient of one optimizer step; returns this rank's mean loss, a scalar on the device."""
    config, device = run.config, run.world.device
    mean_loss = torch.zeros((), device=device)
    for micro in range(config.accumulate):
        with log.data_wait():
            batch = next(batches)
        micro_step = step * config.accumulate + micro
        images, target = to_model_input(batch, device, run.model.config)  # [B, 3, H, W], [B]
        images, target = mix(run, images, target, micro_step)  # [B, 3, H, W], [B, C]
        devices.seeded(config.seed, micro_step, run.world.rank)  # drop path
        run.update.remember(step + 1, batch.paths)
        with gradients_stay_local(run.trained, micro + 1 < config.accumulate):
            with devices.autocast(device, config.precision):
                logits = run.trained(images)  # [B, C]
            loss = soft_target_cross_entropy(logits, target, run.class_weights) / config.accumulate
            run.update.scaled(loss).backward()
        mean_loss += loss.detach()
    return mean_loss


def mix(run: Run, images: Tensor, target: Tensor, micro_step: int) -> tuple[Tensor, Tensor]:
    """Mixup or CutMix: images [B, 3, H, W], class indices [B] -> the same, probabilities [B, C]."""
    options = run.config.data
    draw = draw_mix(options, *images.shape[2:], seed=run.config.seed, step=micro_step, rank=run.world.rank)
    return apply_mix(images, target, draw, run.shape.num_classes, options.label_smoothing)


def is_due(run: Run, every: int) -> bool:
    return run.state.step % every == 0 or run.state.step == run.total_steps


def save(run: Run, log: RunLog, name: str = "") -> None:
    """Writes the checkpoint of this step, or `name` for evaluation, never with non-finite weights; drops old ones."""
    run.update.check()
    state = replace(run.state, bad_files=bad_files(run))
    sharded = run.config.parallel == "fsdp"
    if not (sharded or run.world.is_main):
        return
    folder = checkpoint.folder_of(run.config.output_dir)
    values = checkpoint.values(
        state,
        run.shape,
        run.scale,
        config=configuration.as_dict(run.config),
        vit_config=dict(run.model.config),
        identity=run.identity,
    )
    ema = run.ema.module if run.ema else None
    with log.pause("checkpoint"):
        if run.world.is_main:
            save_class_names(folder, run.data.class_names)
        if sharded and not name:
            others = {} if ema is None else {"ema": ema}
            path, kept = folder / f"checkpoint-{run.state.step}", values | {"has_ema": ema is not None}
            tidy = partial(drop_old, run, folder)
            shards.save_shards(path, kept, run.optimizer, run.model, log.writer, tidy, **others)
            return
        if sharded or (name and run.config.model.train == "lora"):
            content = checkpoint.whole(values, run.model, ema)
        else:
            content = checkpoint.tensors(run.model, run.optimizer, ema) | values
        path = folder / (name or f"checkpoint-{run.state.step}.pt")
        if content:
            log.writer.submit(content, lambda kept: (checkpoint_file.save(kept, path), drop_old(run, folder)))


def drop_old(run: Run, folder: Path) -> None:
    """Leaves the newest checkpoints that are whole."""
    checkpoint_file.keep_newest(folder, run.config.keep_checkpoints, "checkpoint-*.pt")
    shards.keep_newest_shards(folder, run.config.keep_checkpoints)


def bad_files(run: Run) -> dict[str, str]:
    """Broken training pictures met so far on any rank, each with what is wrong."""
    merged: dict[str, str] = {}
    for found in gather_objects(run.data.training.bad_files.state_dict()):
        merged |= found
    return merged


def evaluate_if_due(run: Run, log: RunLog) -> Score | None:
    """Scores the model (its weight average if there is one) and keeps it when it is the best so far.

    Raises:
        Preempted: asked to stop meanwhile. The checkpoint is written; the continued run begins with this evaluation.
    """
    config, state = run.config, run.state
    every = config.eval_every * run.shape.steps_per_epoch
    if not config.do_eval or state.step == state.evaluated or not is_due(run, every):
        return None
    run.update.check()
    with log.pause("evaluate"):
        model = run.ema.module if run.ema else run.model
        score = evaluate_model(model, until_stopped(run, log), run.world, config.precision)
    if score.count < len(run.data.evaluation.folder):
        save(run, log)
        raise log.stopped(state.step)
    log.record(state.step, "eval", correct=score.top1, count=score.count, **score.metrics)
    value = -score.loss if config.metric_for_best == "loss" else score.metrics[config.metric_for_best]
    is_best = state.best is None or value > state.best
    state.evaluated, state.stale = state.step, 0 if is_best else state.stale + 1
    state.best_top1 = max(state.best_top1, score.top1_percent)
    if is_best:
        state.best = value
        save(run, log, "best.pt")
    return score


def until_stopped(run: Run, log: RunLog) -> Iterator[Batch]:
    """This rank's batches of the evaluation set, up to a signal; sharded ranks keep step."""
    if run.config.parallel != "fsdp":
        yield from until_asked(run.data.evaluation)
        return
    for batch in bar(run.data.evaluation.of_equal_length(), "evaluate"):
        if log.preempted():
            return
        yield batch


def is_stale(run: Run) -> bool:
    """Whether the last evaluations have brought nothing better, as often as `early_stop` allows."""
    return 0 < run.config.early_stop <= run.state.stale


def finish(run: Run, log: RunLog, score: Score | None) -> dict[str, Any]:
    """The result of a run that came to its end."""
    keys: dict[str, Any] = {"BadImages": len(bad_files(run))}
    if score is not None:
        log.info(f"evaluation: {score}")
        keys |= {"AccuracyIs": "top-1 of held-out pictures, %", "Top5Accuracy": score.top5_percent}
        keys |= {"BestAccuracy": run.state.best_top1, "EvalCount": score.count}
    return log.finish(accuracy=score.top1_percent if score else None, **keys)
