"""fp16 loss scaling with fairseq's rules (fairseq/optim/dynamic_loss_scaler.py), for `common.update.GuardedStep`."""

from __future__ import annotations


class LossScaler:
    """Doubles the scale after `window` steps without overflow, halves it on one; the overflowing step is skipped.

    Args:
        enabled: False without fp16: the scale is 1, and there is nothing to update.
        scale: initial scale.
        window: steps, fairseq's default is 2**14 / ranks / update_freq.
        tolerance: share of overflowing steps since the last change that is put up with.
        threshold: the scale does not fall below it.
        minimum: at or below it training has failed.
    """

    def __init__(
        self,
        enabled: bool,
        scale: float = 128.0,
        window: int = 2**14,
        tolerance: float = 0.0,
        threshold: float | None = None,
        minimum: float = 1e-4,
    ):
        self.enabled = enabled
        self.scale = float(scale) if enabled else 1.0
        self.window, self.tolerance, self.threshold, self.minimum = max(1, window), tolerance, threshold, minimum
        self._steps = 0
        self._last_overflow = -1
        self._last_rescale = -1
        self._overflows = 0

    def update(self, finite: bool) -> None:
        """Takes note of whether a step's gradient was finite.

        Raises:
            FloatingPointError: the scale has become too small.
        """
        if not self.enabled:
            return
        if finite:
            if (self._steps - self._last_overflow) % self.window == 0:
                self.scale *= 2
                self._last_rescale = self._steps
            self._steps += 1
            return
        before = self.scale
        since_rescale = self._steps - self._last_rescale
        self._last_overflow = self._steps
        self._overflows += 1
        if self._overflows / since_rescale >= self.tolerance:
            self.scale = max(self.scale / 2, self.threshold or 0.0)
            self._last_rescale = self._steps
            self._overflows = 0
        if self.scale <= self.minimum:
            self.scale = before
            raise FloatingPointError(
                f"the fp16 loss scale fell to {self.minimum} (common.min_loss_scale): the loss is probably exploding. "
                "Lower the learning rate, lengthen the warm-up, or use bf16; the last checkpoint is intact"
            )
        self._steps += 1

    def state_dict(self) -> dict[str, float]:
        names = ("scale", "_steps", "_last_overflow", "_last_rescale", "_overflows")
        return {name.lstrip("_"): getattr(self, name) for name in names}

    def load_state_dict(self, state: dict[str, float]) -> None:
        if self.enabled:
            self.scale = float(state["scale"])
            for name in ("steps", "last_overflow", "last_rescale", "overflows"):
                if name in state:  # fairseq keeps the scale alone
                    setattr(self, f"_{name}", state[name])
