"""Samples per second of the steady part of a run.

FPS = global samples / wall seconds of the steady steps. The device is synchronised at both ends of the window. The
first steps (compilation, caches) and pauses (evaluation, checkpoints) are left out; waiting for data is left in.
"""

from __future__ import annotations

import time

import torch

from common import device as devices


class SteadyClock:
    """Samples and wall seconds of the steady part of a run."""

    def __init__(self, device: torch.device, skip_steps: int):
        self._device = device
        self._skip = skip_steps
        self._steps = 0
        self._samples = 0
        self._paused = 0.0
        self._begin: tuple[float, int, int, float] | None = None  # time, steps, samples, paused seconds

    @property
    def is_steady(self) -> bool:
        """Whether the window begins after all the steps to be skipped."""
        return self._begin is not None and self._begin[1] >= self._skip

    def start(self) -> None:
        self._mark()

    def tick(self, samples: int) -> None:
        self._steps += 1
        self._samples += samples
        # A very short run keeps the mark after its first step, so that it still has a number to show.
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
        steps, samples, seconds = self._since_mark()
        return samples / seconds if steps else None

    def seconds_per_step(self) -> float:
        steps, _, seconds = self._since_mark()
        return seconds / max(steps, 1)

    def _mark(self) -> None:
        devices.synchronize(self._device)
        self._begin = (time.perf_counter(), self._steps, self._samples, self._paused)

    def _since_mark(self) -> tuple[int, int, float]:
        devices.synchronize(self._device)
        begin, steps, samples, paused = self._begin or (time.perf_counter(), self._steps, self._samples, self._paused)
        seconds = time.perf_counter() - begin - (self._paused - paused)
        return self._steps - steps, self._samples - samples, max(seconds, 1e-9)
