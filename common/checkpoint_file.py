"""Checkpoint files: written whole or not at all, found again after a crash, loaded without running foreign code.

This file knows files, not models: what a checkpoint holds is each project's business.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import pickle
import re
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch


class CheckpointError(ValueError):
    """A checkpoint that is missing, cut short, or not safe to load. The message names the file and what to do."""


def save(obj: Any, path: str | Path) -> Path:
    """Writes `obj` with `torch.save` so that `path` holds either the old content or all of the new, whenever we crash.

    Temporary file in the same folder -> fsync -> rename -> fsync of the folder.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            torch.save(obj, file)
            file.flush()
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)  # mkstemp made it private; give it the mode a plain open() would
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise
    _sync_folder(path.parent)
    return path


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def load(path: str | Path, map_location: Any = "cpu", allow: Sequence[type] = ()) -> Any:
    """Loads a checkpoint with `weights_only=True`; tensors land on the CPU unless told otherwise.

    Args:
        path: the file.
        map_location: as in `torch.load`.
        allow: further harmless classes the file may hold. `argparse.Namespace` always may: MAE and BEiT keep their
            options in it.

    Raises:
        CheckpointError: missing, truncated, or holding something other than weights and plain values.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: no such checkpoint file")
    try:
        with torch.serialization.safe_globals([argparse.Namespace, *allow]):
            return torch.load(path, map_location=map_location, weights_only=True)
    except pickle.UnpicklingError as error:
        reason = str(error).splitlines()[0]
        wanted = re.search(r"(?:GLOBAL|Unsupported (?:class|global)[^A-Za-z_]*)\s*([\w.]+)", str(error))
        what = f"wants to run {wanted.group(1)}" if wanted else f"is refused ({reason[:200]})"
        raise CheckpointError(
            f"{path}: {what} while loading. Only tensors and plain values are loaded, since a pickle can run any code; "
            "if you trust its author, re-save its state_dict with torch.save and use that file"
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0][:200]
        raise CheckpointError(f"{path}: not a readable checkpoint, maybe cut short ({reason})") from error


def newest(folder: str | Path, pattern: str = "*.pt") -> Path | None:
    """The newest checkpoint of a folder that loads, or None.

    Newest by the last number in the name (`checkpoint-1200.pt`), not by file time: a copied or touched file must not
    win. A file that does not load (cut short by a full disk, say) is passed over with a warning.
    """
    for path in sorted(Path(folder).glob(pattern), key=_number, reverse=True):
        try:
            load(path)
            return path
        except CheckpointError as error:
            warnings.warn(f"skipping a damaged checkpoint: {error}", stacklevel=2)
    return None


def keep_newest(folder: str | Path, count: int, pattern: str = "*.pt") -> None:
    """Deletes all but the `count` newest numbered checkpoints; those named best or last are never touched."""
    if count <= 0:
        return
    numbered = [p for p in Path(folder).glob(pattern) if _number(p) >= 0 and not re.search("best|last", p.name)]
    for path in sorted(numbered, key=_number)[:-count]:
        path.unlink(missing_ok=True)


def _number(path: Path) -> int:
    numbers = re.findall(r"\d+", path.stem)
    return int(numbers[-1]) if numbers else -1
