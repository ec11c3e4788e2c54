"""One update, of pretraining or fine-tuning, one validation of pretraining, and the state that is checkpointed."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from omegaconf import DictConfig

from common import device as devices
from common import distributed
from common.distributed import World
from common.run.preemption import asked, until_asked
from common.update import GuardedStep
from data2vec.config import adam_betas
from data2vec.model.ema import ema_decay_at, ema_step
from data2vec.training.loss_scaler import LossScaler
from data2vec.training.optimizer import FairseqAdam, cosine_lr, polynomial_lr

# Standard deviation, averaged over features, under which representations count as collapsed.
COLLAPSED_STD = 1e-4
REMEDY = "Lower the learning rate, lengthen the warm-up (lr_scheduler.warmup_updates), or use bf16 or fp32"


@dataclass
class TrainState:
    """Where a run is; what a checkpoint holds."""

    model: torch.nn.Module
    optimizer: FairseqAdam
    scaler: LossScaler
    step: GuardedStep
    num_updates: int = 0
    epoch: int = 1
    iterations: int = 0  # micro-batches of this epoch that are done
    best_loss: float | None = None
    is_sharded: bool = False  # model, teacher and optimizer, over the ranks (`sharding.shard`)
    evaluation_due: bool = False  # a signal came during it: a continued run begins with it
    previous_seconds: float = 0.0
    meters: dict[str, dict[str, float]] = field(default_factory=dict)  # sums of the unfinished log lines, as saved
    identity: dict[str, Any] = field(default_factory=dict)  # of the run: what a resumed one must share
    started: float = field(default_factory=time.perf_counter)

    def seconds(self) -> float:
        """Training time so far, earlier runs included."""
        return self.previous_seconds + time.perf_counter() - self.started


@dataclass
class Run:
    """What every step needs: configuration, place among the ranks, forward pass and state.

    `forward` is a function of (model, batch) that returns the model's output dict. `filler` gives the batch with which
    a rank that has none takes part in the gathering of a sharded model; what it computes counts for nothing.
    """

    config: DictConfig
    world: World
    precision: str
    forward: Callable[[torch.nn.Module, Any], dict[str, Any]]
    state: TrainState
    filler: Callable[[], Any] | None = field(default=None, kw_only=True)


@dataclass
class UpdateResult:
    """Sums over all ranks and micro-batches, on the device where reading them would wait for it."""

    loss_sum: torch.Tensor
    sample_size: torch.Tensor
    sentences: torch.Tensor
    tokens: torch.Tensor  # real ones
    grad_norm: torch.Tensor
    pred_std: torch.Tensor  # of each rank's last micro-batch, mean over features and ranks; nan where no rank has one
    target_std: torch.Tensor
    ema_decay: float | None
    lr: float
    skipped: bool = False  # fp16 overflow


def make_state(model: torch.nn.Module, config: DictConfig, precision: str, world: World) -> TrainState:
    """Optimizer, loss scaler and guarded step for a model, from the configuration.

    Raises:
        UsageError: a precision that the device lacks.
    """
    devices.require_precision(world.device, precision)
    optimizer = FairseqAdam(
        model.parameters(),
        lr=0.0,
        betas=adam_betas(config),
        eps=config.optimizer.adam_eps,
        weight_decay=config.optimizer.weight_decay,
        fused=devices.fused_adamw(world.device),
    )
    common = config.common
    scaler = LossScaler(
        precision == "fp16",
        common.fp16_init_scale,
        common.fp16_scale_window or int(2**14 / world.size / config.optimization.update_freq[0]),
        common.fp16_scale_tolerance,
        common.threshold_loss_scale,
        common.min_loss_scale,
    )
    step = GuardedStep(
        optimizer,
        [p for p in model.parameters() if p.requires_grad],
        scaler,
        clip_norm=config.optimization.clip_norm,
        clip_eps=0.0 if precision == "fp16" else 1e-6,  # as fairseq's two implementations of clipping
        remedy=REMEDY,
    )
    return TrainState(model, optimizer, scaler, step)


def learning_rate(config: DictConfig, num_updates: int) -> float:
    """Of the update that follows `num_updates` updates."""
    schedule, options = config.lr_scheduler, config.optimization
    common = (num_updates, options.lr[0], options.max_update, schedule.warmup_updates)
    if schedule._name == "polynomial_decay":
        return polynomial_lr(*common, schedule.end_learning_rate, schedule.power)
    return cosine_lr(
        *common,
        schedule.warmup_init_lr,
        schedule.min_lr,
        schedule.t_mult,
        schedule.lr_period_updates,
        schedule.lr_shrink,
    )


def ema_decay(config: DictConfig, num_updates: int) -> float | None:
    """Of the teacher; None where there is none."""
    model = config.model
    if "ema_decay" not in model:
        return None
    return ema_decay_at(num_updates, model.ema_decay, model.ema_end_decay, model.ema_anneal_end_step)


def train_update(run: Run, batches: list[Any]) -> UpdateResult:
    """One optimizer step over this rank's micro-batches.

    Teacher first (fairseq steps it when an update begins, once a micro-batch), then forward and backward, then one
    all-reduce of gradients and sums, clipping and Adam.

    Args:
        batches: `update_freq` micro-batches; one without rows (of a short shard) only takes part in the sums.

    Raises:
        FloatingPointError: on all ranks alike. fp16: the loss scale is exhausted. On a CPU: the gradient norm is not
            finite. Accelerators do not wait for the norm: `state.step.check()` raises at the next log line.
    """
    state, config = run.state, run.config
    decay, lr = ema_decay(config, state.num_updates), learning_rate(config, state.num_updates)
    own = accumulate_gradients(run, batches, decay)  # [7]
    gradients = _all_gradients(state.step.parameters)
    # FSDP2 has reduced its gradients already, to means
    sums = distributed.all_reduce_sum(own) if state.is_sharded else _reduce(gradients, own)
    loss_sum, sample_size, sentences, tokens, *spread, spreads = sums
    state.optimizer.param_groups[0]["lr"] = lr
    divisor = sample_size.clamp(min=1)  # to the gradient of the mean loss
    done = state.step(state.num_updates + 1, own[0], divisor / run.world.size if state.is_sharded else divisor)
    state.num_updates += done.applied
    state.iterations += len(batches)
    pred_std, target_std = (value / spreads for value in spread)
    return UpdateResult(
        loss_sum, sample_size, sentences, tokens, done.norm, pred_std, target_std, decay, lr, skipped=not done.applied
    )


def accumulate_gradients(run: Run, batches: list[Any], decay: float | None) -> torch.Tensor:
    """Gradients of this rank's micro-batches in the update that is next, summed.

    Returns:
        fp32 [7]: loss, masked tokens, sentences, tokens; standard deviation of predictions and of targets in the last
        micro-batch that has one, and whether there is one, 1 or 0.
    """
    model, state, device = run.state.model, run.state, run.world.device
    model.train()
    devices.seeded(run.config.common.seed, state.num_updates, run.world.rank)
    names = [name for batch in batches for name in batch.names]
    state.step.remember(state.num_updates + 1, names, epoch=state.epoch, iterations=state.iterations)
    loss_sum, counts = torch.zeros(1, device=device), [0, 0, 0]
    spread = None
    for i, batch in enumerate(batches):
        if decay is not None and (i == 0 or run.config.model.ema_steps == "per_micro_batch"):
            ema_step(model, decay)
        if len(batch.id) == 0:
            if state.is_sharded:
                _compute_for_nothing(run)
            continue
        with devices.autocast(device, run.precision):
            out = run.forward(model, batch)
        state.step.scaled(out["loss_sum"]).backward()
        loss_sum += out["loss_sum"].detach()
        own = (out["sample_size"], len(batch.id), batch.num_tokens)
        counts = [total + count for total, count in zip(counts, own, strict=True)]
        if len(out.get("pred", ())) > 1:
            spread = representation_std(out["pred"], out["target"])
    on_host = torch.tensor([*counts, float(spread is not None)], dtype=torch.float32)
    on_device = devices.to_device(on_host, device)
    spread = torch.zeros(2, device=device) if spread is None else spread
    return torch.cat((loss_sum, on_device[:3], spread, on_device[3:]))


def _compute_for_nothing(run: Run) -> None:
    """A forward and a backward pass without any gradient, in which the other ranks' blocks are gathered."""
    assert run.filler is not None
    with devices.autocast(run.world.device, run.precision):
        out = run.forward(run.state.model, run.filler().to(run.world.device))
    (0 * out["loss_sum"]).backward()


def _all_gradients(parameters: list[torch.nn.Parameter]) -> list[torch.Tensor]:
    """Of each parameter, zeros where a rank had no batch: Adam steps all parameters, and ranks exchange all of them."""
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    return [p.grad for p in parameters]


def _reduce(gradients: list[torch.Tensor], sums: torch.Tensor) -> torch.Tensor:
    """Sums gradients (in place) and `sums` over ranks, in one flat buffer."""
    if distributed.world_size() == 1:
        return sums
    flat = torch.cat([*(g.flatten() for g in gradients), sums])
    torch.distributed.all_reduce(flat)
    *parts, sums = flat.split([*(g.numel() for g in gradients), len(sums)])
    torch._foreach_copy_(gradients, [part.view_as(g) for part, g in zip(parts, gradients, strict=True)])
    return sums


@torch.no_grad()
def representation_std(pred: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """[2]: standard deviation over tokens (two or more) of predictions and of targets, mean over features.

    Both fall to zero when the representation collapses: every token is then described by the same vector.
    """
    return torch.stack([x.float().std(dim=0).mean() for x in (pred, target)])


def check_collapse(pred_std: float, target_std: float, num_updates: int, warmup_updates: int = 0) -> None:
    """Raises FloatingPointError, explaining it, when representations have collapsed.

    Predictions count from the end of the warm-up on: an untrained student may well predict constants (masked patches
    start out alike, and differ by position only through a bias that is zero at first).
    """
    suspects = [("teacher's targets", target_std)]
    if num_updates > warmup_updates:
        suspects.append(("student's predictions", pred_std))
    for what, value in suspects:
        if value < COLLAPSED_STD and num_updates > 0:
            raise FloatingPointError(
                f"collapse at update {num_updates}: the {what} have a standard deviation of {value:.2e} over tokens "
                "(about 1 is normal for layer-normalised targets). Every token gets the same vector, so the loss is "
                "small and nothing is learned. Lower the learning rate or lengthen the warm-up, raise model.ema_decay, "
                "and keep model.layer_norm_target_layer on (data2vec paper, section 3.3); go on from a checkpoint "
                "before this update"
            )


def _whole(state: TrainState) -> contextlib.AbstractContextManager[None]:
    """A sharded model is whole meanwhile: ranks have other numbers of batches."""
    if not state.is_sharded:
        return contextlib.nullcontext()
    from data2vec.training.sharding import gathered  # half a second to import

    return gathered(state.model)


@torch.no_grad()
def validate(run: Run, loader) -> torch.Tensor | None:
    """float64 [4] on the CPU: loss sum, masked tokens, sentences, batches, over all ranks.

    None on all ranks where one was asked to stop meanwhile: the sums would be of a part.
    """
    model, device = run.state.model, run.world.device
    model.eval()
    sums = torch.zeros(5, dtype=torch.float64)
    with _whole(run.state):
        for batch in until_asked(loader):
            if len(batch.id) == 0:
                continue
            batch = batch.to(device)
            with devices.autocast(device, run.precision):
                out = run.forward(model, batch)
            found = [float(out["loss_sum"]), out["sample_size"], len(batch.id), 1]
            sums[:4] += torch.tensor(found, dtype=torch.float64)
    sums[4] = float(asked())
    *sums, stopped = distributed.all_reduce_sum(sums)
    return None if stopped else torch.stack(sums)
