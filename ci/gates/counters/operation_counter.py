"""Counts what a piece of torch code does: operations, host reads, memory, collectives. Exact, on any host.

The counts are taken where operators are dispatched, after autograd and autocast: forward, backward and the optimizer,
with the dtypes that are really computed in. What a kernel does inside, its speed and its scratch memory are not seen.
"""

from __future__ import annotations

import traceback
import weakref
from collections import Counter
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Python reading a tensor's value: on an accelerator the host waits there until the device has come so far.
_HOST_READ_OPERATIONS = {"_local_scalar_dense", "equal"}
_HOST_READ_METHODS = {torch.Tensor.tolist: "tolist", torch.Tensor.numpy: "numpy", torch.Tensor.__array__: "numpy"}


class OperationCounter(TorchDispatchMode):
    """Counts inside its `with` block, which may be entered again to go on.

    Attributes:
        operations: by "name.overload dtype", the dtype of the first tensor of the result (else of the arguments).
        host_reads: by "what at file:function", the innermost line outside the libraries.
        dynamic_shapes: operators whose result's shape depends on values; each is compiled anew on an NPU.
        collectives: by name; `collective_bytes` is what this rank hands in.
        allocated_bytes: sum over the storages that came to be; `peak_bytes`: most that lived at once, of those.
    """

    def __init__(self) -> None:
        super().__init__()
        self.operations: Counter[str] = Counter()
        self.host_reads: Counter[str] = Counter()
        self.dynamic_shapes: Counter[str] = Counter()
        self.collectives: Counter[str] = Counter()
        self.collective_bytes = 0
        self.allocated_bytes = self.live_bytes = self.peak_bytes = 0
        self._live: set[int] = set()
        self._function_mode = _HostReads(self.host_reads)

    def __enter__(self) -> OperationCounter:
        self._function_mode.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._function_mode.__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        result = func(*args, **kwargs)
        made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        name = func.name().partition("::")
        if name[0] == "aten":
            self._count_operation(func, given, made)
        elif name[0] in ("c10d", "_c10d_functional", "c10d_functional"):
            self._count_collective(func, given)
        else:
            self.operations[f"{func} {_dtype(made or given)}"] += 1
        self._count_memory(given, made)
        return result

    def _count_operation(self, func: Any, given: list[torch.Tensor], made: list[torch.Tensor]) -> None:
        name = str(func).removeprefix("aten.").removesuffix(".default")
        self.operations[f"{name} {_dtype(made or given)}"] += 1
        if name.partition(".")[0] in _HOST_READ_OPERATIONS:
            self.host_reads[f"{name} at {_place()}"] += 1
        by_position = name.startswith("index.") and not any(t.dtype in (torch.bool, torch.uint8) for t in given[1:])
        if torch.Tag.dynamic_output_shape in func.tags and not by_position:
            self.dynamic_shapes[f"{name} at {_place()}"] += 1

    def _count_collective(self, func: Any, given: list[torch.Tensor]) -> None:
        name = str(func).partition(".")[2].removesuffix(".default")
        if not name.startswith("wait_tensor"):
            self.collectives[name] += 1
            self.collective_bytes += sum(tensor.nbytes for tensor in given)

    def _count_memory(self, given: list[torch.Tensor], made: list[torch.Tensor]) -> None:
        old = {_storage_id(tensor) for tensor in given}
        for tensor in made:
            key = _storage_id(tensor)
            if key in old or key in self._live:
                continue
            storage = tensor.untyped_storage()
            size = storage.nbytes()
            self._live.add(key)
            self.allocated_bytes += size
            self.live_bytes += size
            self.peak_bytes = max(self.peak_bytes, self.live_bytes)
            weakref.finalize(storage, self._freed, key, size).atexit = False

    def _freed(self, key: int, size: int) -> None:
        self._live.discard(key)
        self.live_bytes -= size


class _HostReads(TorchFunctionMode):
    """Sees the reads that are no operators."""

    def __init__(self, host_reads: Counter[str]):
        super().__init__()
        self._host_reads = host_reads

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func in _HOST_READ_METHODS:
            self._host_reads[f"{_HOST_READ_METHODS[func]} at {_place()}"] += 1
        return func(*args, **(kwargs or {}))


def _dtype(tensors: list[torch.Tensor]) -> str:
    return str(tensors[0].dtype).removeprefix("torch.") if tensors else "-"


def _storage_id(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _place() -> str:
    """`package/file.py:function` of the innermost frame that is neither a library's nor this file's."""
    for frame in reversed(traceback.extract_stack()):
        if "site-packages" not in frame.filename and "<" not in frame.filename and frame.filename != __file__:
            return f"{'/'.join(frame.filename.split('/')[-2:])}:{frame.name}"
    return "?"
