"""What the four trainings share: a run's parts, its steps, its checkpoints.

run = new_run(options, world, precision, replica, groups, steps, rates)
with run.open_log() as log:
    for done in training_steps(run, log, batches, loss_of):    # fetch, forward, backward, guarded update, log line
        ...                                                    # the script's own: evaluate, save
"""

from __future__ import annotations

import argparse
import contextlib
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from beit2.data.batches import RunBatches, run_batches
from beit2.training import checkpoints
from beit2.training.identity import MAY_CHANGE
from beit2.training.optimizers import create_optimizer, lr_range, set_step
from beit2.training.parallel import Replica
from beit2.training.state import Scalars, TrainState
from common import device as devices
from common.device import mix_seed
from common.distributed import World
from common.run import replay
from common.run.preemption import Interrupted
from common.run.run_folder import agree_on, compare
from common.run_log import RunLog
from common.update import GuardedStep, LossScale, gradients_stay_local, loss_scale

LossFunction = Callable[[Any], tuple[Tensor, Scalars]]  # a micro-batch -> its loss, and what is logged ("loss" is)


@dataclass
class Run:
    """One training run.

    Attributes:
        steps: optimizer steps of an epoch.
        rates: learning rate by step; groups scale it.
        decays: weight decay by step, for groups that have any.
        source: the checkpoint it goes on from, None for a new one.
        kept: what that checkpoint has beside weights, optimizer and progress, such as the best accuracy.
        identity: what the run is of, which a run that goes on from its checkpoints must share.
        flops: of the model in a step on one picture (model/flops.py), for MFU.
    """

    options: argparse.Namespace
    world: World
    precision: str
    replica: Replica
    optimizer: torch.optim.Optimizer
    scale: LossScale
    step: GuardedStep
    steps: int
    rates: Sequence[float]
    decays: Sequence[float]
    state: TrainState = field(default_factory=TrainState)
    source: Path | None = None
    kept: dict[str, Any] = field(default_factory=dict)
    identity: dict[str, Any] = field(default_factory=dict)
    flops: float = 0.0

    @property
    def last(self) -> int:
        """The step it ends at."""
        whole = self.options.epochs * self.steps
        return min(whole, self.options.max_steps or whole)

    @property
    def samples(self) -> int:
        """Of a step over all ranks."""
        return self.options.batch_size * self.options.update_freq * self.world.size

    @property
    def epoch(self) -> int:
        """The last one that was finished, from 0."""
        return self.state.step // self.steps - 1

    def open_log(self, pictures: int) -> RunLog:
        """The run's log, to be entered; says what begins, `pictures` to train on."""
        if self.world.is_main:
            begins = f"resuming from step {self.state.step} ({self.source})" if self.source else "starting"
            millions = self.replica.parameter_count / 1e6
            ranks = f"{self.world.size} x {devices.describe(self.world.device)}"
            print(
                f"{begins}: {self.options.model}, {millions:.1f} M parameters, {pictures} pictures, {self.last} steps "
                f"of {self.samples}, {self.precision} on {ranks}",
                flush=True,
            )
        return checkpoints.open_log(self.options, self.world, self.last, self.source is not None, self.precision)

    def save(self, log: RunLog, done: Done, **extra: Any) -> None:
        """Writes the checkpoints that are due, `extra` in them. Every rank calls it."""
        if not done.saves:
            return
        with log.pause("save"):
            progress = self.state.plain() | checkpoints.run_shape(self.steps)
            extra |= {"identity": self.identity}
            what = (self.options, self.optimizer, self.scale, progress, self.epoch, done.numbered, extra)
            self.replica.save(*what, log.writer)

    @contextlib.contextmanager
    def evaluating(self, log: RunLog, done: Done | None, kept: Callable[[], dict[str, Any]]) -> Iterator[None]:
        """Around an evaluation after a step; raises Interrupted where a stop was asked for (common/run/preemption.py).

        Args:
            done: the step that it comes after; None where there is nothing to save.
            kept: () -> what its checkpoint has besides.

        Raises:
            Preempted: on all ranks. The checkpoint says that what follows the step is still to be done.
        """
        try:
            with log.pause("evaluate"):
                yield
        except Interrupted:
            if done is not None:
                self.save(log, done, unfinished=True, **kept())
            raise log.stopped(self.state.step) from None


@dataclass(frozen=True)
class Done:
    """What a step was, and what is due after it.

    Attributes:
        epoch_ends: it was the last of its epoch.
        run_ends: it was the last of the run.
        saves: a checkpoint is due; `numbered`: one that stays, too.
    """

    epoch_ends: bool
    run_ends: bool
    saves: bool
    numbered: bool


def new_run(
    options: argparse.Namespace,
    world: World,
    precision: str,
    replica: Replica,
    groups: list[dict[str, Any]],
    steps: int,
    rates: Sequence[float],
    decays: Sequence[float] | None = None,
    after: Callable[[], None] | None = None,
    identity: dict[str, Any] | None = None,
) -> Run:
    """A run at its beginning, or where the checkpoint that the options lead to was written.

    Args:
        groups: of parameters, for the optimizer.
        decays: by default --weight_decay in every step.
        after: called when the weights have changed.
        identity: what the run is of (identity.py); a checkpoint of another one is refused.

    Raises:
        UsageError: options the optimizer refuses, or a checkpoint that does not fit.
    """
    optimizer = create_optimizer(
        options.opt, groups, options.lr, options.opt_eps, options.opt_betas, options.momentum, world.device
    )
    scale = loss_scale(world.device, precision, options.loss_scale)
    step = GuardedStep(optimizer, replica.model.parameters(), scale, clip_norm=options.clip_grad, after=after)
    if decays is None:
        decays = np.full(len(rates), options.weight_decay)
    run = Run(options, world, precision, replica, optimizer, scale, step, steps, rates, decays, identity=identity or {})
    searches = options.auto_resume or options.replay is not None
    found = checkpoints.find_checkpoint(options.resume, searches, options.output_dir)
    run.source = agree_on(found, world)
    progress = {"step": options.start_epoch * steps}
    if run.source is not None:
        restored, run.kept = replica.load(run.source, optimizer, scale, steps)
        progress |= restored
        note = compare(
            run.source, run.kept.get("identity"), run.identity,
            may_change=MAY_CHANGE, accepted=options.accept_changes,
        )  # fmt: skip
        if note and world.is_main:
            print(f"note: {note}", flush=True)
    run.state = TrainState(**progress)
    return run


def training_steps(run: Run, log: RunLog, batches: RunBatches, loss_of: LossFunction) -> Iterator[Done]:
    """Trains from the run's state to its last step and says after each what is due.

    Raises:
        NonFiniteStep: on all ranks, before anything that is saved or evaluated has seen it.
        Preempted: on all ranks, after the checkpoint of a run that was asked to stop.
    """
    options, state = run.options, run.state
    if run.kept.pop("unfinished", False):  # what came after that step was interrupted
        yield done_of(run, saves=True)
    first = state.step
    for step in range(first, run.last):
        with log.data_wait():
            micro_batches = [next(batches) for _ in range(options.update_freq)]
        set_step(run.optimizer, run.rates[step], run.decays[step])
        seed_step(options.seed, step, run.world.rank)
        run.step.remember(step + 1, batches.names(step))
        began = time.perf_counter()
        scalars = gradient_step(run.replica.wrapped, run.step, loss_of, micro_batches, step + 1)
        if step == first and getattr(options, "compile", False):
            devices.synchronize(run.world.device)
            log.info(f"first step: {time.perf_counter() - began:.1f} s, in which torch.compile made the blocks' code")
        lr, min_lr = lr_range(run.optimizer)
        scalars |= {"lr": lr, "min_lr": min_lr, "weight_decay": float(run.decays[step])}
        state.add(scalars)

        epoch_ends, run_ends = state.step % run.steps == 0, state.step == run.last
        stops = log.preempted()
        due_to_save = epoch_ends or run_ends or stops or due(state.step, options.save_every)
        if due_to_save or due(state.step, options.log_every):
            run.step.check()
        log.step(state.step, run.samples, epoch=state.step / run.steps, flops=run.flops * run.samples, **scalars)
        yield done_of(run, due_to_save)
        if stops and not run_ends:
            raise log.stopped(state.step)


def done_of(run: Run, saves: bool) -> Done:
    """What the last step was."""
    epoch_ends = run.state.step % run.steps == 0
    numbered = epoch_ends and due(run.epoch + 1, getattr(run.options, "save_ckpt_freq", 0))
    return Done(epoch_ends, run.state.step == run.last, saves and run.options.case_kind == "acc", numbered)


def gradient_step(
    model: nn.Module, step: GuardedStep, loss_of: LossFunction, micro_batches: Sequence[Any], number: int
) -> Scalars:
    """Forward and backward over the micro-batches, then one guarded update. Returns what is logged, on the device."""
    means = accumulate_gradients(model, step, loss_of, micro_batches)
    norm, _ = step(number, means["loss"])
    return means | {"grad_norm": norm, "loss_scale": step.scale.scale}


def accumulate_gradients(
    model: nn.Module, step: GuardedStep, loss_of: LossFunction, micro_batches: Sequence[Any]
) -> Scalars:
    """Forward and backward over the micro-batches. Returns the means of what is logged, on the device."""
    model.train()
    means: Scalars = {}
    for count, batch in enumerate(micro_batches, 1):
        with gradients_stay_local(model, count < len(micro_batches)):
            loss, scalars = loss_of(batch)
            step.scaled(loss / len(micro_batches)).backward()
        for name, value in scalars.items():
            means[name] = means.get(name, 0.0) + value / len(micro_batches)
    return means


def replay_step(run: Run, dataset: Dataset, loss_of: LossFunction, collate_fn: Callable | None = None) -> dict:
    """--replay: the recorded step once more on the weights that the run would go on from; its result file."""
    options, recorded = run.options, replay.read(run.options.replay, run.last)
    step = recorded.step - 1
    batches = run_batches(dataset, options, run.world, run.steps, step, step + 1, collate_fn)

    def attempt() -> Tensor:
        seed_step(options.seed, step, run.world.rank)
        run.step.remember(step + 1, batches.names(step))
        return accumulate_gradients(run.replica.wrapped, run.step, loss_of, list(batches))["loss"]

    with checkpoints.open_evaluation_log(options, run.world, "replay") as log:
        log.info(f"weights: {run.source or 'those that a run begins with'}; {run.precision}")
        return replay.run(recorded, log, run.replica.model, run.step, attempt)


def seed_step(seed: int, step: int, rank: int) -> None:
    """What a step draws is a function of its number: dropped paths from torch, mixup from NumPy and Python."""
    devices.seeded(seed, step, rank)
    np.random.seed(mix_seed(seed, step, rank) % 2**32)
    random.seed(mix_seed(seed, step, rank))


def due(count: int, every: int) -> bool:
    """Whether something that happens every so often happens now; never with `every` 0."""
    return every > 0 and count % every == 0
