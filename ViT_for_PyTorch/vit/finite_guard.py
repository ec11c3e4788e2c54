"""Keeps non-finite updates out of the model without waiting for the device."""

from __future__ import annotations

import torch
from torch import Tensor


class FiniteGuard:
    """Makes a step with a non-finite loss or gradient leave weights and optimizer untouched, and then stops the run.

    Reading the loss on the host before each update would stall an accelerator every step. Instead the fused optimizer
    is told on the device (`found_inf`, the hook that gradient scalers use) to skip the update, and `check` raises
    later: at the next log line and before every checkpoint. Give it values that are equal on all ranks (an averaged
    loss, the norm of averaged gradients), so that all ranks decide alike.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, device: torch.device):
        self._optimizer = optimizer
        self._first_bad = torch.zeros((), dtype=torch.int64, device=device)  # step, 0 = none so far

    def protect(self, step: int, loss: Tensor, grad_norm: Tensor) -> None:
        """Call before `optimizer.step()`; scalars on the device."""
        bad = ~(torch.isfinite(loss) & torch.isfinite(grad_norm))  # []
        self._note(step, bad)
        self._optimizer.found_inf = bad.float()

    def note(self, step: int, loss: Tensor) -> None:
        """For fp16, where the gradient scaler owns `found_inf` and infinite gradients are part of its search."""
        self._note(step, ~torch.isfinite(loss))

    def _note(self, step: int, bad: Tensor) -> None:
        self._first_bad = torch.where((self._first_bad == 0) & bad, step, self._first_bad)

    def check(self) -> None:
        """Waits for the device. Raises FloatingPointError naming the first bad step."""
        step = int(self._first_bad)
        if step:
            raise FloatingPointError(
                f"the loss or its gradient became inf or nan at step {step}; that update was not applied and the last "
                "checkpoint is intact. Lower the learning rate, set optimizer.clip_grad, or use bf16 or fp32"
            )
