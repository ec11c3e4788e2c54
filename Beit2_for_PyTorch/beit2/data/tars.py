"""Pictures in tars, for sets that outgrow a file system: listed once, then read straight out of them by their offsets.

So the order is as random, and a resumed run as exact, as with files. The tars must be plain, not compressed.
"""

from __future__ import annotations

import errno
import os
import re
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from beit2.data import kept_list
from beit2.data.picture_list import PictureList
from common.data import pictures
from common.data.whole_tar import Member
from common.errors import UsageError

CACHE = ".beit2_tars"
CACHED_FROM = 10_000  # pictures


@dataclass(frozen=True)
class TarMember:
    """A picture inside a tar; to its reader like a path."""

    tar: Path
    name: str
    offset: int
    size: int

    def __fspath__(self) -> str:
        return f"{self.tar}/{self.name}"

    __str__ = __fspath__

    def read_bytes(self) -> bytes:
        with open(self.tar, "rb") as file:
            file.seek(self.offset)
            data = file.read(self.size)
        if len(data) < self.size:
            raise OSError(errno.EIO, "the tar ends before its picture does", str(self.tar))
        return data


class TarPictures(PictureList):
    """Pictures of several tars, named TAR/MEMBER below the folder, in the order of the tars and in theirs.

    Args:
        root: the folder of the tars.
        names: relative, each ended by a zero byte.
        tars: the tars' names.
        counts: pictures of each, int64 [tars].
        places: offset and size of every picture, int64 [pictures, 2].
    """

    def __init__(self, root: Path, names: bytes, tars: Sequence[str], counts: np.ndarray, places: np.ndarray):
        super().__init__(root, names)
        self.tars, self.places, self._last = list(tars), places, np.cumsum(counts)

    def __getitem__(self, index: int | slice):
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        name, index = self.name(index), index % len(self)
        tar = self.tars[int(np.searchsorted(self._last, index, side="right"))]
        offset, size = (int(value) for value in self.places[index])
        return TarMember(self.root / tar, name[len(tar) + 1 :], offset, size)

    def size(self, index: int) -> int:
        return int(self.places[index, 1])


@dataclass(frozen=True)
class Listed:
    """What one look at tars finds; plain, to be sent to other ranks and kept beside the data."""

    root: Path
    names: bytes
    tars: list[str]
    counts: np.ndarray
    places: np.ndarray

    def pictures(self) -> TarPictures:
        return TarPictures(self.root, self.names, self.tars, self.counts, self.places)


def list_tars(root: Path, tars: Sequence[str], option: str) -> Listed:
    """The pictures of tars in a folder: as kept beside them while none has changed, else from the tars' headers.

    Raises:
        UsageError: a tar that is damaged, compressed or cut short.
    """
    state = {tar: [(status := os.stat(root / tar)).st_size, status.st_mtime_ns] for tar in tars}
    for file in kept_list.places(root, CACHE):
        kept = kept_list.read(file)
        if kept is not None and kept[0].get("tars") == state:
            return _from_bytes(root, kept[0], kept[1], tars)
    names: list[bytes] = []
    places: list[tuple[int, int]] = []
    counts = []
    for tar in tars:
        before = len(names)
        _list_tar(root / tar, tar, names, places, option)
        counts.append(len(names) - before)
    sizes = np.array(counts, np.int64), np.array(places, np.int64).reshape(-1, 2)
    listed = Listed(root, b"".join(names), list(tars), *sizes)
    if len(names) >= CACHED_FROM:
        header = {"tars": state, "counts": counts, "names": len(listed.names)}
        kept_list.keep(kept_list.places(root, CACHE), header, listed.names + listed.places.tobytes())
    return listed


def _from_bytes(root: Path, header: dict, payload: bytes, tars: Sequence[str]) -> Listed:
    places = np.frombuffer(payload[header["names"] :], np.int64).reshape(-1, 2)
    return Listed(root, payload[: header["names"]], list(tars), np.array(header["counts"], np.int64), places)


def _list_tar(path: Path, tar: str, names: list[bytes], places: list[tuple[int, int]], option: str) -> None:
    size = os.stat(path).st_size
    try:
        with tarfile.open(path, "r:", tarinfo=Member) as file:
            for member in file:
                file.members = []  # else it keeps every header that it has read
                if not (member.isfile() and _is_picture(member.name)):
                    continue
                if member.offset_data + member.size > size:
                    raise tarfile.ReadError(f"it ends within {member.name}")
                names.append(os.fsencode(f"{tar}/{member.name}") + b"\0")
                places.append((member.offset_data, member.size))
    except (tarfile.TarError, EOFError) as error:
        raise UsageError(f"{option} {path}: not a whole, uncompressed tar ({error}); fetch it again") from error


def _is_picture(name: str) -> bool:
    return name.lower().endswith(pictures.SUFFIXES) and not any(map(pictures.is_litter, name.split("/")))


def words_of(tar: str) -> set[str]:
    """The words in a tar's name: imagenet-val-0001.tar -> imagenet, val."""
    return set(re.findall(r"[a-z]+(?:20\d\d)?", Path(tar).stem.lower()))
