"""What one side of a step benchmark is: a function that does one optimizer step, on any device."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

from torch import Tensor

from common.errors import UsageError

PROJECTS = {
    "vit": "ViT_for_PyTorch",
    "beit2": "Beit2_for_PyTorch",
    "clip": "CLIP_for_PyTorch",
    "data2vec": "Data2vec_for_PyTorch",
}


@dataclass(frozen=True)
class Step:
    """One side of a comparison.

    Attributes:
        run: does one optimizer step on a batch that is already on the device, as a loader with its copies ahead would
            leave it; returns the loss, a scalar on the device.
        samples: how many `unit` a step works on.
        unit: images, pairs or tokens.
    """

    run: Callable[[], Tensor]
    samples: int
    unit: str


def sides_of(project: str) -> ModuleType:
    """The module of a project's steps: `SIDES`, name to builder(size, device, precision, compiled) -> Step; "ours" is
    first."""
    if project not in PROJECTS:
        raise UsageError(f"project {project!r}: choose one of {', '.join(PROJECTS)}")
    return importlib.import_module(f"ci.peers.steps.{project}")
