"""Arrays that are worked out once and then mapped into memory by every process of a host, which share them.

They lie in a folder of the cache, a .npy file each. Its name has a digest of what they were made from, so that another
source, tokenizer or rule is another folder; and it gets that name when everything is on the disk, so that there is
never half of one. It is sealed with digests (common/checkpoint/digests.py): what a disk changes later is built anew.
"""

from __future__ import annotations

import contextlib
import errno
import glob
import hashlib
import json
import os
import shutil
import socket
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from common import distributed
from common.checkpoint import digests
from common.distributed import World
from common.errors import UsageError

FORMAT = 1  # of the columns: another number where they mean something else
_MARK = "made_from.json"
_NO_PLACE = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.ENOTDIR, errno.EEXIST}
_NO_PLACE |= {errno.ENOENT}  # of what is being written: another container of this host name took it for a leftover
Columns = dict[str, np.ndarray]


def key_of(facts: Mapping[str, Any]) -> str:
    text = json.dumps({"format": FORMAT, **facts}, sort_keys=True)
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()


def stored(
    cache: Path, kind: str, facts: Mapping[str, Any], build: Callable[[], Columns], world: World
) -> tuple[Columns, bool]:
    """The arrays that `build` makes, read-only and mapped, and whether that had to be done now. All ranks call it.

    One process builds, and one of each other host that does not see that disk; the others wait, in no collective. In a
    cache that cannot be written the arrays are put into a temporary folder for this run, which is said.

    Args:
        facts: what the arrays follow from, the same on all ranks; `facts["sources"]` maps files to their stamps.

    Raises:
        UsageError: of `build`, on all ranks; or there is room nowhere.
    """
    folder = cache / f"{kind}_{key_of(facts)}"
    if all(distributed.gather_objects(world.local_rank > 0 or is_whole(folder))):  # one of each host looks
        return _mapped(folder), False
    place: Path | None = None  # of the arrays, where this process has built them

    def make() -> None:
        nonlocal place
        if not is_whole(folder):
            _say_why(folder, kind, facts)
            place = _written(folder, facts, build())

    _one_after_another([world.is_main, world.local_rank == 0 and not world.is_main], make)
    places = dict(answer for answer in distributed.gather_objects((socket.gethostname(), place)) if answer[1])
    columns = _mapped(places.get(socket.gethostname(), folder))
    distributed.barrier()
    if place not in (None, folder):
        shutil.rmtree(place, ignore_errors=True)  # what is mapped stays readable until the last process ends
    return columns, True


def _one_after_another(turns: list[bool], work: Callable[[], None]) -> None:
    """Does `work` when this rank's turn comes; nobody goes on before the turn is over, and all learn what is wrong."""
    for mine in turns:
        problem = None
        if mine:
            try:
                work()
            except UsageError as error:
                problem = error.message
        distributed.wait_for_all()
        if problems := [found for found in distributed.gather_objects(problem) if found]:
            raise UsageError(problems[0])


def is_whole(folder: Path) -> bool:
    """Whether every file is what it was when the folder got its name."""
    return digests.damage(folder) is None


def _mapped(folder: Path) -> Columns:
    columns = {}
    for path in folder.glob("*.npy"):
        columns[path.stem] = np.asarray(np.load(path, mmap_mode="r"))  # plain: np.memmap is slow to index
    return columns


def _written(folder: Path, facts: Mapping[str, Any], columns: Columns) -> Path:
    """Where the arrays are: `folder`, or a temporary one where that cannot be."""
    staging = folder.with_name(f".{folder.name}.{socket.gethostname()}.{os.getpid()}")
    try:
        _remove_leftovers(folder.parent)
        staging.mkdir(parents=True)
        _save(staging, facts, columns)
        if is_whole(folder):  # another run was faster
            shutil.rmtree(staging)
            return folder
        if folder.exists():  # damaged
            os.replace(folder, staging.with_name(f"{staging.name}.old"))
        os.replace(staging, folder)
        _remove_leftovers(folder.parent)
        return folder
    except OSError as error:
        shutil.rmtree(staging, ignore_errors=True)
        if is_whole(folder):  # another run was faster by a moment
            return folder
        if error.errno not in _NO_PLACE:
            raise
        reason = error.strerror
    aside = Path(tempfile.mkdtemp(prefix="clip_index_"))
    try:
        _save(aside, facts, columns)
    except OSError as error:
        shutil.rmtree(aside, ignore_errors=True)
        raise UsageError(
            f"the index of the pairs fits neither into {folder.parent} ({reason}) nor into {aside.parent} "
            f"({error.strerror}): give a --cache_dir with room"
        ) from None
    where = f"the index of the pairs is in {aside.parent} for this run; --cache_dir keeps it elsewhere"
    print(f"note: {folder.parent} cannot be written ({reason}): {where}", flush=True)
    return aside


def _save(folder: Path, facts: Mapping[str, Any], columns: Columns) -> None:
    for name, values in columns.items():
        np.save(folder / f"{name}.npy", values)
    (folder / _MARK).write_text(json.dumps({"facts": facts}), encoding="utf-8")
    digests.seal(folder)


def _say_why(folder: Path, kind: str, facts: Mapping[str, Any]) -> None:
    """A line where there is an index, but not of this; removes those whose sources are no more what they were."""
    if folder.is_dir() and (problem := digests.damage(folder)):  # else another run was faster by a moment
        print(f"note: {folder} is damaged ({problem}): built anew", flush=True)
        shutil.rmtree(folder, ignore_errors=True)
    for other in folder.parent.glob(f"{glob.escape(kind)}_*"):
        try:
            old = json.loads((other / _MARK).read_text(encoding="utf-8"))["facts"]
            sources, before = facts.get("sources") or {}, old.get("sources") or {}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue
        changed = [name for name, stamp in before.items() if sources.get(name, stamp) != stamp]
        if changed:
            print(f"note: {changed[0]} has changed: its index is built anew", flush=True)
            shutil.rmtree(other, ignore_errors=True)


def _remove_leftovers(cache: Path) -> None:
    """What processes of this host left that were killed while they wrote, or have just replaced."""
    for path in cache.glob(f".*.{socket.gethostname()}.*"):
        *_, pid = path.name.removesuffix(".old").split(".")
        with contextlib.suppress(ValueError):
            if path.suffix == ".old" or not psutil.pid_exists(int(pid)):
                shutil.rmtree(path, ignore_errors=True)
