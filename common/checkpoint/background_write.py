"""Checkpoints are written while the training goes on: it stands still for a copy in memory, not for the disk.

    writer.submit(content, lambda kept: checkpoint_file.save(kept, path))   # returns once `content` is copied
    writer.wait()                                                           # until it is on the disk

One write at a time: the next `submit` waits for the one before it, so that there is never more than one copy, whose
memory is used again (new pages would cost five times the copy). A file is still whole or not there
(checkpoint_file.py), and a process that is killed meanwhile leaves the older one. `BACKGROUND_WRITE=0` in the
environment writes at once, for a host whose memory has no room for a copy.
"""

from __future__ import annotations

import copy
import os
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch


class BackgroundWriter:
    """Writes in a thread what `submit` is given, one at a time.

    Args:
        first: called in the thread before each write, for what must be on the disk before it.
    """

    def __init__(self, first: Callable[[], None] = lambda: None) -> None:
        self._first = first
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        self._buffers: list[torch.Tensor] = []  # of the last copy

    @property
    def at_once(self) -> bool:
        """Whether `submit` returns only when all is written."""
        return os.environ.get("BACKGROUND_WRITE") == "0"

    def submit(self, content: Any, write: Callable[[Any], None]) -> None:
        """Copies the tensors of `content` (dicts, lists and tuples) and has `write` called with the copy.

        Raises:
            Exception: of the write before, such as an OSError of a full disk that names the file.
        """
        self.wait()
        if self.at_once:
            self._first()
            write(content)
            return
        kept, self._buffers = copy_to_memory(content, self._buffers)
        self._thread = threading.Thread(target=self._run, args=(write, kept), name="checkpoint", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Returns when nothing is being written any more; raises what the write has raised."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    def check(self) -> None:
        """As `wait`, where nothing is to be waited for: a run ends soon after a failure, not at its next save."""
        if self._thread is not None and not self._thread.is_alive():
            self.wait()

    def _run(self, write: Callable[[Any], None], kept: Any) -> None:
        try:
            self._first()
            write(kept)
        except Exception as error:
            self._error = error


def copy_to_memory(content: Any, buffers: Sequence[torch.Tensor] = ()) -> tuple[Any, list[torch.Tensor]]:
    """`content` with copies of its tensors in the host's memory, and these copies.

    Tensors that were one stay one, as torch.save has it. Other values are kept as they are.

    Args:
        buffers: copies that are no longer needed, to be overwritten.
    """
    copies: dict[tuple, torch.Tensor] = {}
    free: dict[tuple, list[torch.Tensor]] = {}
    for buffer in buffers:
        free.setdefault((buffer.shape, buffer.dtype), []).append(buffer)

    def copied(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            storage = value.untyped_storage().data_ptr()
            key = (storage, value.device, value.storage_offset(), value.shape, value.stride(), value.dtype)
            if value.numel() == 0 or key not in copies:
                fitting = free.get((value.shape, value.dtype))
                kept = fitting.pop() if fitting else torch.empty(value.shape, dtype=value.dtype)
                copies[key] = kept.copy_(value.detach())
            return copies[key]
        if isinstance(value, dict):
            kept = copy.copy(value)  # with what a state_dict has beside its items
            kept.update((name, copied(inner)) for name, inner in value.items())
            return kept
        if isinstance(value, list | tuple) and type(value) in (list, tuple):
            return type(value)(copied(inner) for inner in value)
        return value

    return copied(content), list(copies.values())
