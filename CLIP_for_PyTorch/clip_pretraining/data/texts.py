"""Millions of texts in two arrays: nothing a Python object each, so they can be mapped from a file and shared."""

from __future__ import annotations

import hashlib
import itertools
from array import array
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

_BLOCK = 4096  # texts that are looked at together


class Texts(Sequence[str]):
    """Texts one behind the other. Bytes that were not UTF-8 are kept, as the surrogates that Python reads them to.

    Args:
        data: uint8 [bytes of all], UTF-8.
        ends: int64 [texts + 1], where each begins and, last, where the last one ends.
    """

    def __init__(self, data: np.ndarray, ends: np.ndarray):
        self.data, self.ends = data, ends

    @classmethod
    def of(cls, texts: Iterable[str]) -> Texts:
        if isinstance(texts, cls):
            return texts
        growing = GrowingTexts()
        for text in texts:
            growing.append(text)
        return growing.packed()

    def __len__(self) -> int:
        return len(self.ends) - 1

    def __getitem__(self, index):
        """One text, or the list of a slice."""
        if isinstance(index, slice):
            start, stop, step = index.indices(len(self))
            return self._side_by_side(start, stop) if step == 1 else [self[i] for i in range(start, stop, step)]
        index = range(len(self))[index]
        return _decoded(self.data[self.ends[index] : self.ends[index + 1]].tobytes())

    def __iter__(self) -> Iterator[str]:
        for start in range(0, len(self), _BLOCK):
            yield from self._side_by_side(start, min(start + _BLOCK, len(self)))

    def _side_by_side(self, start: int, stop: int) -> list[str]:
        if stop <= start:
            return []
        ends = self.ends[start : stop + 1].tolist()
        block = self.data[ends[0] : ends[-1]].tobytes()
        return [_decoded(block[a - ends[0] : b - ends[0]]) for a, b in itertools.pairwise(ends)]

    def take(self, positions: np.ndarray) -> Texts:
        """The texts at these positions."""
        lengths = np.diff(self.ends)[positions]
        ends = np.concatenate([[0], np.cumsum(lengths)])
        data = np.empty(ends[-1], dtype=np.uint8)
        for first in range(0, len(positions), _BLOCK):
            block = slice(first, first + _BLOCK)
            shift = np.repeat(self.ends[:-1][positions[block]] - ends[:-1][block], lengths[block])
            target = np.arange(ends[first], ends[first] + len(shift))
            data[target] = self.data[target + shift]
        return Texts(data, ends)


class GrowingTexts:
    """Texts that are still being read."""

    def __init__(self) -> None:
        self.data, self.ends = bytearray(), array("q", [0])

    def __len__(self) -> int:
        return len(self.ends) - 1

    def append(self, text: str) -> None:
        self.data += text.encode("utf-8", "surrogatepass")
        self.ends.append(len(self.data))

    def packed(self) -> Texts:
        return Texts(np.frombuffer(self.data, dtype=np.uint8), np.frombuffer(self.ends, dtype=np.int64))


def first_equal(texts: Iterable[str], count: int) -> np.ndarray:
    """Int64 [count]: for each text the position of the first one that is the same. By digests of 128 bits."""
    digests = np.empty((count, 2), dtype=np.uint64)
    for row, text in enumerate(texts):
        digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()
        digests[row] = np.frombuffer(digest, dtype=np.uint64)
    order = np.lexsort((digests[:, 1], digests[:, 0]))  # stable: of equal ones the first comes first
    is_new = np.ones(count, dtype=bool)
    is_new[1:] = (digests[order[1:]] != digests[order[:-1]]).any(1)
    first = np.empty(count, dtype=np.int64)
    first[order] = order[np.maximum.accumulate(np.where(is_new, np.arange(count), 0))]
    return first


def _decoded(data: bytes) -> str:
    return data.decode("utf-8", "surrogatepass")
