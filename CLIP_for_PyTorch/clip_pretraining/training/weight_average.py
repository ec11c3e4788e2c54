"""An exponential moving average of the trained weights, which is what is evaluated and saved for users."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.distributed.tensor import distribute_tensor


class WeightAverage:
    """Follows the trained parameters of a model: after update t it moves by 1 - min(decay, (1 + t) / (10 + t)).

    The first updates move it further, so that it does not remember where a short run began. Of sharded parameters each
    rank averages its own shards.

    Args:
        model: whose parameters are of the right device already.
        decay: in 0..1; 0 keeps no average, and every method does nothing.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.decay = decay
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad} if decay else {}
        self.parameters = trained
        self.values = {name: _local(p).clone() for name, p in trained.items()}

    def __bool__(self) -> bool:
        return self.decay > 0

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Follows the weights after their update number `step`, counted from 1."""
        if self:
            decay = min(self.decay, (1 + step) / (10 + step))
            torch._foreach_lerp_(list(self.values.values()), [_local(p) for p in self.parameters.values()], 1 - decay)

    @torch.no_grad()
    def load(self, values: dict[str, Tensor]) -> None:
        """Goes on from averages that were saved, whole tensors by name."""
        for name, parameter in self.parameters.items():
            value = values[name].to(parameter.device).reshape(parameter.shape)
            if hasattr(parameter, "device_mesh"):
                value = distribute_tensor(value, parameter.device_mesh, parameter.placements).to_local()
            self.values[name].copy_(value)

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """The model has the averaged weights meanwhile."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for name, parameter in self.parameters.items():
            here, kept = _local(parameter), self.values[name]
            before = here.clone()
            here.copy_(kept)
            kept.copy_(before)


def _local(parameter: Tensor) -> Tensor:
    """What this rank holds of it, sharing its memory."""
    parameter = parameter.detach()
    return parameter.to_local() if hasattr(parameter, "to_local") else parameter
