"""common/update.py's guarded step in the place of accelerate's optimizer, whose skips the Trainer then believes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor, nn

from clip_pretraining.training import sharding
from common.device import require_precision
from common.update import GuardedStep, LossScale, Outcome, loss_scale

MAX_CONSTANT_LOSS_SCALE = 65536.0  # above it the first fp16 gradient may be infinite for ever


class GuardedOptimizer(AcceleratedOptimizer):
    """Unscales, clips, applies or skips, the same for every optimizer.

    accelerate's own finds out a skip by watching whether `optimizer.step` was called. It always is with fused AdamW,
    which gets the scale as a tensor and skips inside its kernel (accelerate#4242), or on npu does not skip at all.

    Args:
        optimizer: any of torch's kind.
        parameters: () -> those it trains, asked for at the first step: sharding replaces them before.
        scale: of the loss.
        clip_norm: largest norm of the whole gradient; 0 clips nothing.
        now: () -> (number of the step, this rank's loss).
        after: called when the weights have changed.
    """

    _is_accelerate_prepared = True  # `Accelerator.prepare` takes it as it is

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        parameters: Callable[[], Iterable[nn.Parameter]],
        scale: LossScale,
        clip_norm: float,
        now: Callable[[], tuple[int, Tensor]],
        after: Callable[[], None],
    ):
        super().__init__(optimizer, scaler=None)
        self.parameters, self.scale, self.clip_norm, self.now, self.after = parameters, scale, clip_norm, now, after
        self.outcome = Outcome(torch.zeros(()), True)
        self.sharded = False
        self._guard: GuardedStep | None = None
        self._whole: dict[str, Any] | None = None

    @property
    def guard(self) -> GuardedStep:
        if self._guard is None:
            parameters = list(self.parameters())
            self._guard = GuardedStep(
                self.optimizer, parameters, self.scale, clip_norm=self.clip_norm, after=self.after
            )
        return self._guard

    @contextlib.contextmanager
    def gathered(self) -> Iterator[None]:
        """`state_dict`, which rank 0 alone is asked for, has whole tensors of sharded ones meanwhile."""
        self._whole = sharding.optimizer_state(self.optimizer) if self.sharded else None
        try:
            yield
        finally:
            self._whole = None

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() if self._whole is None else self._whole

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if self.sharded:
            sharding.load_optimizer(self.optimizer, state_dict)
        else:
            super().load_state_dict(state_dict)

    @property
    def step_was_skipped(self) -> bool:
        """What the Trainer asks before it steps the schedule."""
        return not self.outcome.applied

    def step(self, closure: None = None) -> None:
        """Raises `common.update.NonFiniteStep`, see there."""
        self.outcome = self.guard(*self.now())


def scale_of(device: torch.device, precision: str, setting: float | None) -> LossScale:
    """fp16's scale: constant for a number as in apex, dynamic without one, or from one that no constant can be."""
    if setting is None or setting <= MAX_CONSTANT_LOSS_SCALE:
        return loss_scale(device, precision, "dynamic" if setting is None else setting)
    require_precision(device, precision)
    return LossScale(precision == "fp16", setting)
