"""Checkpoints: written whole or not at all, checked by digest, found again after a crash, loaded without foreign code.

    save(state, folder / "checkpoint-1200.pt"); keep_newest(folder, 3)     # a file, with its digest at its end
    path = newest(folder, "checkpoint-*.pt", keys=("model", "optimizer"))  # passes over damaged and foreign ones
    state = load(path)                                                     # CheckpointError names file and cause

Checkpoints that are folders of files are sealed (checkpoint/digests.py). This file knows files, not models.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import pickle
import re
import shutil
import tempfile
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from common.checkpoint import digests
from common.checkpoint.digests import Digesting

# asked once: it can only be asked by setting it, for all threads, and checkpoints are written by one
_UMASK = os.umask(0)
os.umask(_UMASK)
MODE = 0o666 & ~_UMASK  # of a file that a plain open() makes


class CheckpointError(ValueError):
    """A checkpoint that is missing, damaged, foreign or not safe to load. The message names the file and what to do."""

    for_user = True


def save(obj: Any, path: str | Path) -> Path:
    """Writes `obj` with `torch.save` so that `path` holds either the old content or all of the new, whenever we crash.

    Temporary file in the same folder, with the digest at its end -> fsync -> rename -> fsync of the folder.

    Raises:
        OSError: naming the path, e.g. where the disk is full; what `path` held before is still there.
    """
    path = Path(path)
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
        with os.fdopen(handle, "wb") as file:
            writer = Digesting(file)
            try:
                torch.save(obj, writer)
            except RuntimeError:
                raise writer.error or RuntimeError(f"{path}: torch could not write it") from None
            file.write(writer.trailer())
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, MODE)  # mkstemp made it private
        os.replace(temporary, path)
        digests.sync(path.parent)
    except BaseException as error:
        if temporary is not None:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
        if isinstance(error, OSError) and error.errno is not None:
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise
    digests.found_good(path)
    return path


def load(path: str | Path, map_location: Any = "cpu", allow: Sequence[type] = (), mmap: bool = False) -> Any:
    """Loads a checkpoint with `weights_only=True` after checking its digest; tensors land on the CPU unless told else.

    Args:
        path: the file.
        map_location: as in `torch.load`.
        allow: further harmless classes the file may hold. `argparse.Namespace` always may: MAE and BEiT keep their
            options in it.
        mmap: tensors stay in the file until they are used.

    Raises:
        CheckpointError: missing, damaged, no checkpoint at all, or holding something other than weights and values.
    """
    path = Path(path)
    if problem := digests.damage_of_file(path):
        raise CheckpointError(f"{path}: {problem}")
    try:
        with torch.serialization.safe_globals([argparse.Namespace, *allow]), warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=ResourceWarning)
            return torch.load(path, map_location=map_location, weights_only=True, mmap=mmap)
    except pickle.UnpicklingError as error:
        wanted = re.search(r"(?:GLOBAL|Unsupported (?:class|global)[^A-Za-z_]*)\s*([\w.]+)", str(error))
        if wanted is None:
            found = re.search(r"WeightsUnpickler error: (.{,100})", str(error))
            reason = found[1].strip() if found else "no file of torch"
            raise CheckpointError(f"{path}: not a readable checkpoint, or is refused ({reason})") from error
        raise CheckpointError(
            f"{path}: wants to run {wanted[1]} while loading. Only tensors and plain values are loaded, since a pickle "
            "can run any code; if you trust its author, re-save its state_dict with torch.save and use that file"
        ) from error
    except Exception as error:  # a damaged file makes torch raise anything from KeyError to MemoryError
        reason = (str(error) or type(error).__name__).splitlines()[0][:200]
        raise CheckpointError(f"{path}: not a readable checkpoint, maybe cut short ({reason})") from error


def newest(folder: str | Path, pattern: str = "*.pt", keys: Sequence[str] = ()) -> Path | None:
    """The newest whole checkpoint of a folder, or None: of files, or where the pattern matches them of sealed folders.

    Newest by the last number in the name (`checkpoint-1200.pt`), not by file time: a copied or touched file must not
    win. One that is damaged, cut short, or a file without the top-level `keys`, is passed over with a warning.
    """
    for path in sorted(Path(folder).glob(pattern), key=number, reverse=True):
        problem = digests.damage(path) or (None if path.is_dir() else _foreign(path, keys))
        if problem is None:
            return path
        warnings.warn(f"{path}: {problem}; an older checkpoint is looked for", stacklevel=2)
    return None


def _foreign(path: Path, keys: Sequence[str]) -> str | None:
    try:
        content = load(path, mmap=path.open("rb").read(4) == digests.ZIP)
    except CheckpointError as error:
        return str(error).removeprefix(f"{path}: ")
    missing = [key for key in keys if not (isinstance(content, dict) and key in content)]
    return f"no checkpoint of such a run (it has no {', '.join(missing)})" if missing else None


def keep_newest(folder: str | Path, count: int, pattern: str = "*.pt") -> None:
    """Deletes all but the `count` newest whole numbered checkpoints; those named best or last are never touched.

    Damaged ones do not count and stay, so that with one kept there is always a whole one.
    """
    if count <= 0:
        return
    numbered = [p for p in Path(folder).glob(pattern) if number(p) >= 0 and not re.search("best|last", p.name)]
    for path in [p for p in sorted(numbered, key=number) if digests.damage(p) is None][:-count]:
        remove(path)


def remove(path: Path) -> None:
    """Deletes a checkpoint; a folder loses its seal first, so that half of it is never taken for a whole one."""
    if path.is_dir():
        digests.unseal(path)
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def set_aside_newer(path: Path, pattern: str = "*.pt") -> list[Path]:
    """Moves checkpoints numbered above `path`, which a run goes on from, to `earlier/<time>/`; returns their old paths.

    They are of a future that will be different: left there, the next restart would take them for the newest.
    """
    newer = [p for p in path.parent.glob(pattern) if number(p) > number(path) and not re.search("best|last", p.name)]
    aside = path.parent / "earlier" / time.strftime("%Y%m%d-%H%M%S")
    for old in newer:
        aside.mkdir(parents=True, exist_ok=True)
        os.replace(old, aside / old.name)
    return newer


def number(path: Path) -> int:
    """The last number in a checkpoint's name, -1 without one."""
    numbers = re.findall(r"\d+", path.stem if path.suffix in (".pt", ".pth") else path.name)
    return int(numbers[-1]) if numbers else -1
