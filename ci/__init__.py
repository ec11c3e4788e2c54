"""Gates, simulated devices, peers and sample data; nothing that a training run needs.

`ci.loss_compare` and `ci.fake_npu` are the names under which scripts outside this repository know two of the rooms.
"""

from importlib import import_module
from types import ModuleType

_KNOWN_AS = {"loss_compare": "ci.gates.losses.gate", "fake_npu": "ci.npu.fake"}


def __getattr__(name: str) -> ModuleType:
    if name in _KNOWN_AS:
        return import_module(_KNOWN_AS[name])
    raise AttributeError(f"module 'ci' has no attribute {name!r}")
