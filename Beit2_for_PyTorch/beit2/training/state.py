"""How far a run is, and the averages of its epoch."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from common import distributed

Scalars = dict[str, Tensor | float]


@dataclass
class TrainState:
    """How far the run is; saved with every checkpoint.

    Attributes:
        step: optimizer steps done.
        sums: of the current epoch's scalars, by name; kept on the device.
        counts: how many values each sum has.
    """

    step: int = 0
    sums: Scalars = field(default_factory=dict)
    counts: Scalars = field(default_factory=dict)

    def add(self, scalars: Scalars) -> None:
        """Counts a step and adds its scalars; a gradient norm that is not finite (fp16 skipped it) is left out."""
        self.step += 1
        for name, value in scalars.items():
            kept: Tensor | float = 1.0
            if isinstance(value, Tensor):
                value = value.detach().double() if value.device.type == "cpu" else value.detach().float()
                kept = value.isfinite().to(value.dtype)
                value = torch.where(value.isfinite(), value, torch.zeros_like(value))
            self.sums[name] = self.sums.get(name, 0.0) + value
            self.counts[name] = self.counts.get(name, 0.0) + kept

    def means(self) -> dict[str, float]:
        """The epoch's means so far, over all ranks."""
        totals, counts = self._over_ranks()
        return dict(zip(self.sums, (totals / counts.clamp(min=1)).tolist(), strict=True))

    def _over_ranks(self) -> tuple[Tensor, Tensor]:
        """Sums and counts, each the mean over the ranks, in the order of the names."""
        pairs = [[float(self.sums[name]), float(self.counts[name])] for name in self.sums]
        return distributed.all_reduce_mean(torch.tensor(pairs, dtype=torch.float64).view(-1, 2)).unbind(dim=1)

    def begin_epoch(self) -> None:
        self.sums, self.counts = {}, {}

    def plain(self) -> dict:
        """Numbers only, for a checkpoint that every rank continues from. Every rank calls it."""
        totals, counts = self._over_ranks()
        names = list(self.sums)
        return {
            "step": self.step,
            "sums": dict(zip(names, totals.tolist(), strict=True)),
            "counts": dict(zip(names, counts.tolist(), strict=True)),
        }
