"""fairseq's Adam and its schedules: cosine, polynomial."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch


class FairseqAdam(torch.optim.AdamW):
    """Adam as fairseq has it: eps is added to sqrt(v) *before* the bias correction.

    torch adds it after: step = lr / (1 - b1^t) * m / (sqrt(v) / sqrt(1 - b2^t) + eps). With eps / sqrt(1 - b2^t) in
    eps' place the two are algebraically the same, so torch's kernel does the work. Weight decay is decoupled and
    applies to all parameters, biases and norms included. `fused` asks for the one kernel, where the card has it.
    """

    def __init__(
        self,
        params: Iterable[torch.Tensor],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        fused: bool = True,
    ):
        super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, fused=fused)

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            group["steps"] = group.get("steps", 0) + 1  # counted here: reading the state's would wait for the device
            group["fairseq_eps"] = group["eps"]
            group["eps"] = group["eps"] / math.sqrt(1 - group["betas"][1] ** group["steps"])
        try:
            return super().step(closure)
        finally:
            for group in self.param_groups:
                group["eps"] = group.pop("fairseq_eps")


def cosine_lr(
    num_updates: int,
    lr: float,
    max_update: int,
    warmup_updates: int = 0,
    warmup_init_lr: float = -1,
    min_lr: float = 0.0,
    t_mult: float = 1.0,
    lr_period_updates: float = -1,
    lr_shrink: float = 0.1,
) -> float:
    """Learning rate of the update that follows `num_updates` updates (fairseq cosine_lr_scheduler.py).

    The first update therefore has the rate of 0 updates: 0, unless `warmup_init_lr` says otherwise. At `max_update` the
    next period would begin, with everything shrunk by `lr_shrink`.
    """
    start = min_lr if warmup_init_lr < 0 else warmup_init_lr
    if num_updates < warmup_updates:
        return start + num_updates * (lr - start) / warmup_updates
    period = lr_period_updates if lr_period_updates > 0 else max_update - warmup_updates
    if period <= 0:  # the run ends with the warm-up; fairseq divides by zero here
        return lr
    current = num_updates - warmup_updates
    if t_mult != 1:
        i = math.floor(math.log(1 - current / period * (1 - t_mult), t_mult))
        length = t_mult**i * period
        current -= (1 - t_mult**i) / (1 - t_mult) * period
    else:
        i = current // period
        length = period
        current -= period * i
    shrink = lr_shrink**i
    low, high = min_lr * shrink, lr * shrink
    return low + 0.5 * (high - low) * (1 + math.cos(math.pi * current / length))


def polynomial_lr(
    num_updates: int, lr: float, max_update: int, warmup_updates: int = 0, end_lr: float = 0.0, power: float = 1.0
) -> float:
    """Learning rate of the update that follows `num_updates` updates (fairseq polynomial_decay_schedule.py).

    Linear from 0 (which the first update therefore has) over the warm-up, then down to `end_lr` at `max_update`.
    """
    if warmup_updates > 0 and num_updates <= warmup_updates:
        return lr * num_updates / warmup_updates
    if num_updates >= max_update:
        return end_lr
    remaining = 1 - (num_updates - warmup_updates) / (max_update - warmup_updates)
    return (lr - end_lr) * remaining**power + end_lr
