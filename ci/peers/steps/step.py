"""What one side of a step benchmark is: a function that does one optimizer step, on any device."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from torch import Tensor

from common.errors import UsageError

ROOT = Path(__file__).resolve().parents[3]
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
    first. The projects' packages become importable by it, so a process should ask for one project only."""
    if project not in PROJECTS:
        raise UsageError(f"project {project!r}: choose one of {', '.join(PROJECTS)}")
    folder = str(ROOT / PROJECTS[project])
    if folder not in sys.path:
        sys.path.insert(0, folder)
    return importlib.import_module(f"ci.peers.steps.{project}")
