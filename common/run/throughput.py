"""Samples per second of the steady part of a run.

FPS = global samples / wall seconds of the steady steps. The device is synchronised at both ends of the window. The
first steps (compilation, caches) and pauses (evaluation, checkpoints) are left out; waiting for data is left in.
"""

from __future__ import annotations

import time
from typing import TypeAlias

import torch

from common import device as devices

Scalar: TypeAlias = float | int | torch.Tensor
LAST = ("lr", "min_lr", "weight_decay", "loss_scale")  # settings: of the last step; all else is a mean


class SteadyClock:
    """Samples and wall seconds of the steady part of a run."""

    def __init__(self, device: torch.device, skip_steps: int):
        self._device = device
        self._skip = skip_steps
        self._steps = 0
        self._samples = 0
        self._flops = 0.0
        self._paused = 0.0
        # time, steps, samples, FLOPs, paused seconds: at the start, after a step, after the steps to be skipped
        self._marks: list[tuple[float, int, int, float, float]] = []

    @property
    def is_steady(self) -> bool:
        """Whether the window begins after all the steps to be skipped."""
        return bool(self._marks) and self._window_begin()[1] >= self._skip

    def start(self) -> None:
        self._mark()

    def tick(self, samples: int, flops: float = 0.0) -> None:
        self._steps += 1
        self._samples += samples
        self._flops += flops
        # A run that ends here or sooner is measured from the mark before, so that it still has a number to show.
        if self._steps == self._skip or (self._steps == 1 and self._skip > 1):
            self._mark()

    def pause(self) -> float:
        devices.synchronize(self._device)
        return time.perf_counter()

    def go_on(self, begin: float) -> float:
        devices.synchronize(self._device)
        seconds = time.perf_counter() - begin
        self._paused += seconds
        return seconds

    def fps(self) -> float | None:
        """Samples per second of the steady steps; None before there is one."""
        steps, samples, _, seconds = self._since_mark()
        return samples / seconds if steps else None

    def seconds_per_step(self) -> float:
        steps, _, _, seconds = self._since_mark()
        return seconds / max(steps, 1)

    def flops_per_second(self) -> float:
        """Of the models of all ranks in the steady steps; 0 where nobody said."""
        _, _, flops, seconds = self._since_mark()
        return flops / seconds

    def _mark(self) -> None:
        devices.synchronize(self._device)
        self._marks.append((time.perf_counter(), self._steps, self._samples, self._flops, self._paused))

    def _window_begin(self) -> tuple[float, int, int, float, float]:
        """The newest mark with steps behind it."""
        return next((mark for mark in reversed(self._marks) if mark[1] < self._steps), self._marks[-1])

    def _since_mark(self) -> tuple[float, float, float, float]:
        """Steps, samples, floating-point operations, seconds."""
        devices.synchronize(self._device)
        now = (time.perf_counter(), self._steps, self._samples, self._flops, self._paused)
        seconds, steps, samples, flops, paused = (
            b - a for a, b in zip(self._window_begin() if self._marks else now, now, strict=True)
        )
        return steps, samples, flops, max(seconds - paused, 1e-9)


class Window:
    """Sums of the steps since the last line; tensors are summed on their device, without waiting for it."""

    def __init__(self, step: int = 0):
        self.step = step
        self.steps = 0
        self.samples = 0
        self.flops = 0.0
        self.epoch: float | None = None
        self.data_seconds = 0.0
        self.begin = time.perf_counter()
        self._sums: dict[str, Scalar] = {}
        self._last: dict[str, Scalar] = {}

    def add(self, step: int, samples: int, flops: float, epoch: float | None, scalars: dict[str, Scalar]) -> None:
        self.step, self.epoch = step, epoch
        self.steps += 1
        self.samples += samples
        self.flops += flops
        for key, value in scalars.items():
            if key in LAST:
                self._last[key] = value
                continue
            if isinstance(value, torch.Tensor):
                value = value.detach().double() if value.device.type == "cpu" else value.detach().float()
            self._sums[key] = self._sums[key] + value if key in self._sums else value

    def means(self) -> dict[str, float]:
        """Mean of each scalar over the window; of the settings (LAST) the last."""
        means = {key: float(value) / self.steps for key, value in self._sums.items()}
        last = {key: float(value) for key, value in self._last.items()}
        return {"loss": means.pop("loss"), "lr": last.pop("lr"), **means, **last}
