"""Paths of a set's pictures in little memory."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np


class PictureList(Sequence[Path]):
    """Paths below a folder, in one block of memory that loader workers share.

    Args:
        root: the folder.
        names: relative paths in order, each ended by a zero byte.
    """

    def __init__(self, root: Path, names: bytes):
        self.root, self.names = root, names
        self._ends = np.flatnonzero(np.frombuffer(names, dtype=np.uint8) == 0)

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int | slice):
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        return self.root / self.name(index)

    def name(self, index: int) -> str:
        """Relative to the folder."""
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        index %= len(self)
        begin = 0 if index == 0 else int(self._ends[index - 1]) + 1
        return os.fsdecode(self.names[begin : int(self._ends[index])])

    def size(self, index: int) -> int:
        """Of the file, in bytes."""
        return os.stat(self[index]).st_size

    def counts_by_folder(self) -> dict[str, int]:
        """How many pictures each folder directly below the root has, in order."""
        firsts = [name.partition(b"/")[0] for name in self.names.split(b"\0")[:-1]]
        folders, counts = np.unique(np.array(firsts), return_counts=True) if firsts else ([], [])
        return {os.fsdecode(bytes(folder)): int(count) for folder, count in zip(folders, counts, strict=True)}
