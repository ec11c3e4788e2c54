"""Which pictures a folder has: listed by one rank, kept beside the data, never with a validation set in it unsaid."""

from __future__ import annotations

import hashlib
import json
import os
import time
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from common import pictures
from common.distributed import broadcast_object, rank
from common.errors import UsageError

EXTENSIONS = pictures.SUFFIXES
CACHE = ".beit2_pictures"
CACHED_FROM = 10_000  # pictures: fewer are listed in no time
_TRAINING = {"train", "training", "train2014", "train2017"}
_HELD_OUT = {"val", "valid", "validation", "test", "testing", "dev", "val2014", "val2017", "test2014", "test2017"}
_HELD_OUT |= {"eval", "evaluation", "heldout", "held_out", "test2015", "valid2017"}
_RACY_NS = 2 * 10**9  # a folder that changed this short before it was listed may change again within its time stamp


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

    def counts_by_folder(self) -> dict[str, int]:
        """How many pictures each folder directly below the root has, in order."""
        firsts = [name.partition(b"/")[0] for name in self.names.split(b"\0")[:-1]]
        folders, counts = np.unique(np.array(firsts), return_counts=True) if firsts else ([], [])
        return {os.fsdecode(bytes(folder)): int(count) for folder, count in zip(folders, counts, strict=True)}


def list_pictures(
    root: str | Path, option: str = "--data_path", labelled: bool = False, whole: bool = False
) -> PictureList:
    """All pictures below a folder in sorted order, for all ranks from the main rank's look at the disk.

    Where training and held-out folders stand side by side (train/ and val/, COCO's train2017/ and val2017/), training
    takes the former only and says so. Hidden files (`._*` of macOS) and __MACOSX are no pictures.

    Args:
        option: where the folder was given, for messages.
        labelled: its folders are classes.
        whole: held-out sets, too: it is not for training.

    Raises:
        UsageError: on all ranks: no such folder, no picture in it, or a choice that only the user can make.
    """
    result: tuple[bytes, str | None] = (b"", None)
    if rank() == 0:
        try:
            result = _names(Path(root), option, labelled, whole), None
        except UsageError as error:
            result = b"", error.message
        except OSError as error:
            result = b"", (f"{option} {root}: {error.filename or ''} {error.strerror or error}")
    names, problem = broadcast_object(result)
    if problem is not None:
        raise UsageError(problem)
    return PictureList(Path(root), names)


def _names(root: Path, option: str, labelled: bool, whole: bool) -> bytes:
    if not root.is_dir():
        raise UsageError(f"{option} {root}: no such folder")
    training = option == "--data_path" and not labelled
    if not (training or whole):
        _refuse_mixed_sets(root, option)
    names, left_out = _cached(root, training and not whole)
    if left_out:
        print(
            f"note: {option} {root}: not trained on: {', '.join(left_out)}; name a folder itself to take it", flush=True
        )
    if not names:
        raise UsageError(f"{option} {root}: no pictures in it (looked for {' '.join(EXTENSIONS)})")
    return names


def _refuse_mixed_sets(root: Path, option: str) -> None:
    found = [entry.name for entry in os.scandir(root) if entry.is_dir()]
    train = [name for name in found if name.lower() in _TRAINING]
    held_out = [name for name in found if name.lower() in _HELD_OUT]
    if train and held_out:
        first, second = root / train[0], root / held_out[0]
        raise UsageError(
            f"{option} {root}: holds {train[0]}/ and {held_out[0]}/, not classes: give {first} and {second} apart"
        )


def _cached(root: Path, split: bool) -> tuple[bytes, list[str]]:
    """Names and what was left out: as kept beside the data while no folder has changed since, else listed anew."""
    for file in _cache_files(root):
        kept = _read_cache(file, root, split)
        if kept is not None:
            return kept
    began = time.time_ns()
    names, times, left_out = _walk(root, split)
    if names.count(b"\0") >= CACHED_FROM and max(times.values()) < began - _RACY_NS:
        for file in _cache_files(root):
            try:
                _write_cache(file, root, split, names, times, left_out)
                break
            except OSError:  # read-only, or full
                continue
    return names, left_out


def _cache_files(root: Path) -> tuple[Path, Path]:
    """Beside the data; and where that is read-only, among the user's caches."""
    name = hashlib.sha256(os.fsencode(root.resolve())).hexdigest()[:32]
    return root / CACHE, Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "beit2", name)


def _write_cache(file: Path, root: Path, split: bool, names: bytes, times: dict[str, int], left_out: list[str]) -> None:
    listed = times[""]
    if os.stat(root).st_mtime_ns != listed:
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    file.touch()  # which changes the folder's time if it is new; written in place, it does so no more
    times = times | {"": os.stat(root).st_mtime_ns}
    header = {"split": split, "times": times, "left_out": left_out, "crc": zlib.crc32(names)}
    file.write_bytes(json.dumps(header).encode() + b"\n" + names)


def _read_cache(file: Path, root: Path, split: bool) -> tuple[bytes, list[str]] | None:
    try:
        first, _, names = file.read_bytes().partition(b"\n")
        header = json.loads(first)
        if header["split"] != split or header["crc"] != zlib.crc32(names):
            return None
        if any(os.stat(root / folder).st_mtime_ns != kept for folder, kept in header["times"].items()):
            return None
        return names, list(header["left_out"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _walk(root: Path, split: bool) -> tuple[bytes, dict[str, int], list[str]]:
    """Names of pictures, change times of all folders read, and held-out folders that were left out."""
    names: list[str] = []
    times: dict[str, int] = {}
    left_out: list[str] = []
    above: list[tuple[int, int]] = []  # the folders that this one lies in: a link to one of them would never end

    def read(folder: str) -> None:
        where = os.path.join(root, folder)
        status = os.stat(where)
        place = (status.st_dev, status.st_ino)
        if place in above:
            return
        times[folder] = status.st_mtime_ns
        above.append(place)
        with os.scandir(where) as entries:
            found = sorted((entry.name, entry.is_dir()) for entry in entries)
        found = [(name, is_dir) for name, is_dir in found if not pictures.is_litter(name)]
        kept = _without_held_out(folder, [name for name, is_dir in found if is_dir], left_out) if split else None
        names.extend(
            os.path.join(folder, name) for name, is_dir in found if not is_dir and name.lower().endswith(EXTENSIONS)
        )
        for name, is_dir in found:
            if is_dir and (kept is None or name in kept):
                read(os.path.join(folder, name))
        above.pop()

    read("")
    return b"".join(os.fsencode(name) + b"\0" for name in names), times, left_out


def _without_held_out(folder: str, subfolders: list[str], left_out: list[str]) -> set[str]:
    """The subfolders to read. Beside a training folder nothing else is read at the top, and no held-out set below."""
    train = {name for name in subfolders if name.lower() in _TRAINING}
    held_out = {name for name in subfolders if name.lower() in _HELD_OUT}
    kept = train if train and not folder else set(subfolders) - held_out
    left_out.extend(os.path.join(folder, name) + "/" for name in subfolders if name not in kept)
    return kept
