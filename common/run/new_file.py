"""A file that a script exports: whole or not there, of one process at a time, with the mode of a plain open()."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

from common.checkpoint_file import MODE
from common.errors import UsageError
from common.run.folder_lock import Lock


@contextlib.contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """A place beside `path` to write to, which gets its name when the block ends, and goes where it does not end well.

    That is by an error, by Ctrl-C or by SIGTERM; what a killed process left is written over by the next.

    Raises:
        UsageError: the file is there, its folder is not, or another living process writes it.
    """
    if not path.absolute().parent.is_dir():
        raise UsageError(f"{path}: its folder does not exist; make it first, or name another")
    lock = Lock(path.with_name(f".{path.name}.lock"), f"{path}")
    partial = writing(path)
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        if path.exists():  # by a process that had the lock meanwhile
            raise UsageError(f"{path} exists and is not overwritten")
        yield partial
        readable(partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
        lock.release()
        signal.signal(signal.SIGTERM, before)


def writing(path: Path) -> Path:
    """Where `new_file` has its block write, for the ranks that write along."""
    return path.with_name(f".{path.name}.writing")


def readable(path: str | Path) -> None:
    """Gives a .safetensors file, or those of a folder, the mode of a plain open(): safetensors makes them private."""
    path = Path(path)
    for file in path.rglob("*.safetensors") if path.is_dir() else [path]:
        os.chmod(file, MODE)
