"""`import torchvision` beside a torch without CUDA."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import torch

_torchvision_schemas: torch.library.Library | None = None  # kept alive: the ops vanish with the object


def repair_torchvision() -> bool:
    """Makes `import torchvision` work beside a torch without CUDA. Returns whether a repair was needed.

    PyPI's torchvision wheel links its C++ ops against CUDA. Beside a CPU or NPU torch they cannot load, and the import
    dies with "operator torchvision::nms does not exist". None of our projects uses those ops; registering the two names
    torchvision looks for is enough. Where the ops do load (CUDA, or a torchvision built for this torch) nothing is
    done.

    Call it before anything imports torchvision or timm.
    """
    global _torchvision_schemas
    if "torchvision" in sys.modules or _torchvision_schemas is not None:
        return _torchvision_schemas is not None
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None:
        return False
    for library in sorted(Path(spec.origin).parent.glob("_C*.so")):
        try:
            torch.ops.load_library(str(library))
            return False
        except OSError:
            continue
    _torchvision_schemas = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        _torchvision_schemas.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return True
