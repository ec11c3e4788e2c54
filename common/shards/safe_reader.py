"""DCP's reader and planner with limits: by itself DCP unpickles its index and its plain values without any."""

from __future__ import annotations

import io
import pickle
from enum import Enum
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import ReadItem

from common.checkpoint_file import CheckpointError

# what DCP's index consists of; anything else in it is refused
_INDEX_NAMES = {
    "torch.distributed.checkpoint.metadata": set(
        "BytesStorageMetadata ChunkStorageMetadata Metadata MetadataIndex StorageMeta TensorProperties "
        "TensorStorageMetadata _MEM_FORMAT_ENCODING".split()
    ),
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size", *(name for name, value in vars(torch).items() if isinstance(value, torch.dtype))},
    "pathlib": {"Path", "PosixPath"},
}


def _enum_member(kind: Any, name: str) -> Enum:
    """What `builtins.getattr` may do in an index: the first Pythons 3.11 pickle an enum's member by it."""
    if isinstance(kind, type) and issubclass(kind, Enum) and name in kind.__members__:
        return kind[name]
    raise pickle.UnpicklingError(f"its index wants {name!r} of {kind!r}")


class _IndexUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("builtins", "getattr"):
            return _enum_member
        if name in _INDEX_NAMES.get(module, ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"its index wants to run {module}.{name}")


class _Reader(dcp.FileSystemReader):
    """DCP's reader with a safe unpickler for the index."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        with self.fs.create_stream(self._get_metadata_path(kwargs.get("rank")), "rb") as file:
            metadata = _IndexUnpickler(file).load()
        if getattr(metadata, "storage_meta", None) is None:
            metadata.storage_meta = StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


def reader(folder: str | Path) -> _Reader:
    """The reader of a folder whose index is found good; DCP itself would go on without one."""
    found = _Reader(folder)
    try:
        found.read_metadata()
    except (OSError, EOFError, AttributeError, pickle.UnpicklingError) as error:
        raise CheckpointError(f"{folder}: not a readable sharded checkpoint ({error})") from error
    return found


class Planner(dcp.DefaultLoadPlanner):
    """DCP's planner for plain values only."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        # checked first, since DCP's own method then loads the same bytes without limits
        torch.load(value, weights_only=True)
        value.seek(0)
        super().load_bytes(read_item, value)
