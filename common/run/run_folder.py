"""Who owns an output folder, what an earlier run has left in it, and what a resumed run must share with its checkpoint.

with run_folder.owned(output_dir, world):          # RunLog does this for a training; a second run is refused
note = run_folder.compare(path, saved.get("identity"), identity, may_change=("lr", "epochs"), accepted=options)
identity["data"] = run_folder.listing_identity(paths, labels, classes)    # cheap: names, labels, some sizes
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
import socket
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from common.checkpoint import digests
from common.distributed import World, broadcast_object, gather_objects
from common.errors import UsageError
from common.run import folder_lock, result_file

# half-written files and folders of checkpoint_file, shards, result_file and the projects; nothing else is ever removed
_LEFTOVER = re.compile(r"\.(.+\.[a-z0-9_]{8}\.tmp|.+\.(log|txt|json|jsonl)\.tmp|.+\.(writing|saving))|\.complete\.json")
_FINISHED_OLD = re.compile(r"\.(.+)\.old")


# -- the lock --------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def owned(folder: str | Path, world: World, lock: str = folder_lock.NAME) -> Iterator[None]:
    """The folder belongs to this run while the block lasts. All ranks enter it; the main one holds the lock.

    Raises:
        UsageError: on all ranks, where a living run has it (the message names that one), or it cannot be written.
    """
    held, problem = None, None
    if world.is_main:
        try:
            held = folder_lock.Lock(Path(folder) / lock)
        except UsageError as error:
            problem = error.message
    problem = broadcast_object(problem)
    if problem:
        raise UsageError(problem)
    try:
        yield
    finally:
        if held:
            held.release()


# -- what earlier runs left ------------------------------------------------------------------------------------------


def tidy(folder: str | Path) -> list[str]:
    """Removes half-written leftovers of killed runs, two levels deep, and nothing else. Only the owner may call it.

    A checkpoint folder that a crash left between two renames gets its name back. A result file that still says RUNNING
    becomes FAILED: its run is gone.

    Returns:
        What was done, a line each.
    """
    folder, done = Path(folder), []
    levels = (folder.glob(".*"), folder.glob("*/.*"))
    for path in [path for level in levels for path in level if "earlier" not in path.parts[len(folder.parts) :]]:
        old = _FINISHED_OLD.fullmatch(path.name)
        if _is_being_exported(path):
            continue
        if old and path.is_dir() and not path.with_name(old[1]).exists():
            os.replace(path, path.with_name(old[1]))
            done.append(f"{path.with_name(old[1])} is back: a crash had come between two renames")
        elif (old and path.is_dir()) or _LEFTOVER.fullmatch(path.name) or _is_stale_lock(path):
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)
            done.append(f"{path}: half-written by an earlier run, removed")
    done += [f"{path}: said RUNNING, its run is gone: FAILED" for path in result_file.end_stale(folder)]
    return done


def _is_stale_lock(path: Path) -> bool:
    """Whether it is the lock of an evaluation that was killed."""
    return bool(re.fullmatch(r"\..+\.lock", path.name)) and folder_lock.living_owner(path.parent, path.name) is None


def _is_being_exported(path: Path) -> bool:
    """Whether it is what a living process writes (new_file.py)."""
    name, lock = path.name.removesuffix(".writing"), path.name.removesuffix(".writing") + ".lock"
    return name != path.name and folder_lock.living_owner(path.parent, lock) is not None


def hosts_without(folder: str | Path, world: World) -> list[str]:
    """Names of the hosts that do not see what the main rank writes into the folder. All ranks call it."""
    if world.size == world.local_size:
        return []
    # a name never asked for before: a network disk has no old answer for it
    probe = Path(folder) / f".shared.{broadcast_object(uuid.uuid4().hex[:8])}.tmp"
    if world.is_main:
        probe.parent.mkdir(parents=True, exist_ok=True)
        probe.touch()
    broadcast_object(None)  # it is there
    answers = gather_objects((socket.gethostname(), probe.exists()))
    if world.is_main:
        probe.unlink(missing_ok=True)
    return sorted({host for host, sees in answers if not sees})


def agree_on(path: Path | None, world: World) -> Path | None:
    """The main rank's checkpoint to go on from, on all ranks, once each has found the same one there. All call it.

    Raises:
        UsageError: on all ranks, naming the hosts that do not have it: the folder is not shared.
    """
    path = broadcast_object(path)
    if path is None or world.size == 1:
        return path
    answers = gather_objects((socket.gethostname(), _end_of(path)))
    others = sorted({host for host, digest in answers if digest != answers[0][1]})
    if others:
        raise UsageError(
            f"{path}: not there, or another one, on {', '.join(others)}: all hosts go on from one checkpoint, so give "
            "an --output_dir that they share, or copy it to each"
        )
    return path


def _end_of(path: Path) -> bytes | None:
    """The last bytes of a checkpoint file or of a folder's seal, which hold its digest; None where it is not there."""
    seal = path / digests.SEAL
    if path.is_dir() and not seal.exists():
        return b""  # of an earlier version
    try:
        with open(seal if path.is_dir() else path, "rb") as file:
            file.seek(-min(64, file.seek(0, os.SEEK_END)), os.SEEK_END)
            return file.read()
    except OSError:
        return None


# -- what a resumed run must share -----------------------------------------------------------------------------------


def compare(
    path: str | Path,
    saved: Mapping[str, Any] | None,
    current: Mapping[str, Any],
    *,
    may_change: Sequence[str] = (),
    accepted: str | Iterable[str] = (),
    fixed: Sequence[str] = (),
    flag: str = "--accept_changes",
) -> str | None:
    """Compares what a checkpoint is of with what is to be run.

    Args:
        path: the checkpoint, for messages.
        saved: its identity: plain values by name, nested as one likes; None in one of an earlier version.
        current: this run's. What only one of the two has is not compared.
        may_change: names (of values, or of the groups above them) that a user changes on purpose: lr, length.
        accepted: names that the user accepts by `flag`, as a list or with commas between; "all" for all.
        fixed: names that cannot be accepted: with another value the checkpoint's weights or optimizer do not fit.

    Returns:
        One line about what has changed and is allowed to, None where nothing has.

    Raises:
        UsageError: what changes the mathematics, old and new, and the flag that accepts it.
    """
    if saved is None:
        return f"{path} does not say what it is of (an earlier version wrote it): not compared with this run"
    old, new = _flat(saved), _flat(current)
    changed = {name: (old[name], new[name]) for name in new if name in old and old[name] != new[name]}
    names = accepted.split(",") if isinstance(accepted, str) else accepted
    allowed = {name.strip() for name in names if name.strip()}
    if unknown := sorted(name for name in allowed - {"all"} if not any(_under(n, [name]) for n in new)):
        raise UsageError(f"{flag} {unknown[0]}: no such name; there are {', '.join(sorted(new))}")
    refused = [n for n in changed if not ("all" in allowed or _under(n, may_change) or _under(n, allowed))]
    unfit = [n for n in changed if _under(n, fixed)]
    if refused or unfit:
        refused = list(dict.fromkeys([*unfit, *refused]))
        listed = "; ".join(f"{n} was {_short(changed[n][0])}, is now {_short(changed[n][1])}" for n in refused)
        otherwise = f"go on all the same with {flag} {','.join(refused)}"
        if unfit:
            otherwise = f"begin a new run: its weights or its optimizer do not fit with {', '.join(unfit)} changed"
        raise UsageError(
            f"{path}: cannot be continued by this run, which is another one: {listed}. Use what it was made with, or "
            f"{otherwise}"
        )
    told = "; ".join(f"{name} {_short(a)} -> {_short(b)}" for name, (a, b) in changed.items())
    return f"changed since {path}: {told}" if told else None


def listing_identity(
    names: Sequence[str], labels: Iterable[Any] = (), classes: Sequence[str] = (), root: str | Path | None = None
) -> dict[str, Any]:
    """What a listing of files or samples is, in a few values: count, classes, and a digest of names and labels.

    Args:
        names: of files or samples, in their order; below `root` where that is given.
        labels: class numbers, captions or whatever belongs to them.
        root: where the files are: the sizes of up to 256 of them, evenly chosen, go into the digest. Its own name does
            not: data may move.
    """
    digest = hashlib.sha256()
    prefix = "" if root is None else f"{os.path.join(root, '')}"
    names = [str(name).removeprefix(prefix) for name in names]
    for name in names:
        digest.update(os.fsencode(name) + b"\0")
    for label in labels:
        digest.update(str(label).encode("utf-8", "surrogateescape") + b"\0")
    if root is not None:
        for name in names[:: max(1, -(-len(names) // 256))]:
            digest.update(b"%d\0" % os.stat(os.path.join(root, name)).st_size)
    return {"count": len(names), "classes": list(classes), "digest": digest.hexdigest()[:16]}


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:  # as JSON and weights-only files give them back
            flat[f"{prefix}{key}"] = list(value) if isinstance(value, tuple) else value
    return flat


def _under(name: str, groups: Iterable[str]) -> bool:
    return any(name == group or name.startswith(f"{group}.") for group in groups)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:70]}..."
