"""One update, one validation, and the state that is checkpointed between them."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

import torch
from omegaconf import DictConfig

from common import device as devices
from common import distributed
from common.distributed import World
from data2vec.config import adam_betas
from data2vec.model.ema import ema_decay_at, ema_step
from data2vec.training.finite_guard import FiniteGuard
from data2vec.training.loss_scaler import LossScaler
from data2vec.training.optimizer import FairseqAdam, clip_coefficient, cosine_lr, gradient_norm

# Standard deviation, averaged over features, under which representations count as collapsed.
COLLAPSED_STD = 1e-4


@dataclass
class TrainState:
    """Where a run is; what a checkpoint holds."""

    model: torch.nn.Module
    optimizer: FairseqAdam
    scaler: LossScaler
    guard: FiniteGuard = field(default_factory=FiniteGuard)
    num_updates: int = 0
    epoch: int = 1
    iterations: int = 0  # micro-batches of this epoch that are done
    best_loss: float | None = None
    previous_seconds: float = 0.0
    meters: dict[str, dict[str, float]] = field(default_factory=dict)  # sums of the unfinished log lines, as saved
    started: float = field(default_factory=time.perf_counter)

    def seconds(self) -> float:
        """Training time so far, earlier runs included."""
        return self.previous_seconds + time.perf_counter() - self.started


@dataclass
class UpdateResult:
    """Sums over all ranks and micro-batches, on the device where reading them would wait for it."""

    loss_sum: torch.Tensor
    sample_size: torch.Tensor
    sentences: torch.Tensor
    tokens: torch.Tensor  # real ones
    grad_norm: torch.Tensor
    pred_std: torch.Tensor  # of the last micro-batch, mean over features
    target_std: torch.Tensor
    ema_decay: float
    lr: float
    skipped: bool = False  # fp16 overflow


def make_state(model: torch.nn.Module, config: DictConfig, precision: str, world_size: int) -> TrainState:
    """Optimizer and loss scaler for a model, from the configuration."""
    optimizer = FairseqAdam(
        model.parameters(),
        lr=0.0,
        betas=adam_betas(config),
        eps=config.optimizer.adam_eps,
        weight_decay=config.optimizer.weight_decay,
    )
    common = config.common
    scaler = LossScaler(
        precision == "fp16",
        common.fp16_init_scale,
        common.fp16_scale_window or int(2**14 / world_size / config.optimization.update_freq[0]),
        common.fp16_scale_tolerance,
        common.threshold_loss_scale,
        common.min_loss_scale,
    )
    return TrainState(model, optimizer, scaler)


def learning_rate(config: DictConfig, num_updates: int) -> float:
    """Of the update that follows `num_updates` updates."""
    schedule = config.lr_scheduler
    return cosine_lr(
        num_updates,
        config.optimization.lr[0],
        config.optimization.max_update,
        schedule.warmup_updates,
        schedule.warmup_init_lr,
        schedule.min_lr,
        schedule.t_mult,
        schedule.lr_period_updates,
        schedule.lr_shrink,
    )


def ema_decay(config: DictConfig, num_updates: int) -> float:
    model = config.model
    return ema_decay_at(num_updates, model.ema_decay, model.ema_end_decay, model.ema_anneal_end_step)


def train_update(state: TrainState, batches: list[Any], config: DictConfig, world: World, precision: str, forward):
    """One optimizer step over this rank's micro-batches.

    Teacher first (fairseq steps it when an update begins, once a micro-batch), then forward and backward, then one
    all-reduce of gradients and sums, clipping and Adam.

    Args:
        batches: `update_freq` micro-batches; one without rows (of a short shard) only takes part in the sums.
        forward: function of (model, batch) that returns the model's output dict.

    Returns:
        UpdateResult.

    Raises:
        FloatingPointError: fp16: the loss scale is exhausted; on a CPU: the gradient norm is not finite. Accelerators
            do not wait for the norm: they skip the update, and `state.guard.check()` raises. On all ranks alike.
    """
    model, device = state.model, world.device
    model.train()
    devices.seeded(config.common.seed, state.num_updates, world.rank)
    decay = ema_decay(config, state.num_updates)
    loss_sum, counts = torch.zeros(1, device=device), [0, 0, 0]
    spread = torch.zeros(2, device=device)
    for i, batch in enumerate(batches):
        if i == 0 or config.model.ema_steps == "per_micro_batch":
            ema_step(model, decay)
        if len(batch.id) == 0:
            continue
        with devices.autocast(device, precision):
            out = forward(model, batch)
        (out["loss_sum"] * state.scaler.scale).backward()
        loss_sum += out["loss_sum"].detach()
        own = (out["sample_size"], len(batch.id), batch.num_tokens)
        counts = [total + count for total, count in zip(counts, own, strict=True)]
        spread = representation_std(out["pred"], out["target"])

    parameters = [p for p in model.parameters() if p.requires_grad]
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    gradients = [p.grad for p in parameters]
    on_host = torch.tensor(counts, dtype=torch.float32)
    sums = _reduce(gradients, torch.cat((loss_sum, devices.to_device(on_host, device))))  # [4]
    factor = 1 / (sums[1].clamp(min=1) * state.scaler.scale)  # to the gradient of the mean loss
    norm = gradient_norm(gradients) * factor
    lr = learning_rate(config, state.num_updates)
    result = UpdateResult(sums[0], sums[1], sums[2], sums[3], norm, *spread, ema_decay=decay, lr=lr)
    if state.scaler.enabled:  # whether the step counts, and the next scale, depend on the norm: the host has to know it
        result.skipped = not state.scaler.update(float(norm))
    if not result.skipped:
        if config.optimization.clip_norm > 0:
            factor = factor * clip_coefficient(norm, config.optimization.clip_norm, precision == "fp16")
        # The fused kernel divides gradients by grad_scale as it reads them: no pass of its own over all gradients.
        state.optimizer.grad_scale = 1 / factor
        state.optimizer.found_inf = state.guard.found_inf(state.num_updates + 1, norm)
        state.optimizer.param_groups[0]["lr"] = lr
        state.optimizer.step()
        if device.type == "cpu":  # nothing to wait for
            state.guard.check()
        state.num_updates += 1
    state.optimizer.zero_grad()
    state.iterations += len(batches)
    return result


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
    """[2]: standard deviation over tokens of predictions and of targets, mean over features.

    Both fall to zero when the representation collapses: every token is then described by the same vector.
    """
    if len(pred) < 2:
        return torch.full((2,), float("nan"), device=pred.device)
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


@torch.no_grad()
def validate(model: torch.nn.Module, loader, world: World, precision: str, forward) -> torch.Tensor:
    """float64 [4] on the CPU: loss sum, masked tokens, sentences, batches, over all ranks."""
    model.eval()
    sums = torch.zeros(4, dtype=torch.float64)
    for batch in loader:
        if len(batch.id) == 0:
            continue
        batch = batch.to(world.device)
        with devices.autocast(world.device, precision):
            out = forward(model, batch)
        sums += torch.tensor([float(out["loss_sum"]), out["sample_size"], len(batch.id), 1], dtype=torch.float64)
    return distributed.all_reduce_sum(sums)
