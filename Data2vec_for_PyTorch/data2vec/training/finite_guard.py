"""Keeps inf and nan out of the model without waiting for the device."""

from __future__ import annotations

import torch


class FiniteGuard:
    """The fused optimizer is told on the device (`found_inf`, the hook of gradient scalers) to skip a bad update; the
    host learns of it when it looks, at the next log line and before every checkpoint, and stops the run.

    Norms are those of gradients summed over ranks, so all ranks decide alike.
    """

    def __init__(self):
        self._first_bad: torch.Tensor | None = None  # int64 scalar, 0 = none so far

    def found_inf(self, update: int, norm: torch.Tensor) -> torch.Tensor:
        """fp32 scalar for the optimizer: 1 when the norm is inf or nan. `update` counts from 1."""
        bad = ~torch.isfinite(norm)
        if self._first_bad is None:
            self._first_bad = torch.zeros((), dtype=torch.int64, device=norm.device)
        self._first_bad = torch.where((self._first_bad == 0) & bad, update, self._first_bad)
        return bad.float()

    def check(self) -> None:
        """Waits for the device. Raises FloatingPointError naming the first bad update."""
        update = 0 if self._first_bad is None else int(self._first_bad)
        if update:
            raise FloatingPointError(
                f"the gradient norm became inf or nan at update {update}: the model was not updated with it. Lower the "
                "learning rate or lengthen the warm-up; the last checkpoint is intact"
            )
