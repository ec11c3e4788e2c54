"""What comes out of a run: the first rank's output, shown and logged, torchrun's own words, and the ranks' reports.

A rank opens these pipes by their names in /proc: torchrun hands on nothing but its own output to what it starts.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import sys
from collections import deque
from collections.abc import Iterator
from io import FileIO
from pathlib import Path

_CHUNK = 1 << 16


class Streams:
    """The four pipes of a run, read by one loop.

    Args:
        folder: where the logs are; torchrun's words go to torchrun.log there, which exists only if it said something.
    """

    def __init__(self, folder: Path):
        self._folder = folder
        self._selector = selectors.DefaultSelector()
        self._read: dict[str, int] = {}
        self._write: dict[str, int] = {}
        for name in ("stdout", "stderr", "torchrun", "reports"):
            self._read[name], self._write[name] = os.pipe()
            os.set_blocking(self._read[name], False)
            self._selector.register(self._read[name], selectors.EVENT_READ, name)
        wake, waker = os.pipe()
        os.set_blocking(wake, False)
        os.set_blocking(waker, False)
        signal.set_wakeup_fd(waker, warn_on_full_buffer=False)
        self._selector.register(wake, selectors.EVENT_READ, "wake")
        self._wake = wake
        self._partial = {name: b"" for name in self._read}
        self._early: list[bytes] = []  # lines before the first rank has told its log
        self._log: Path | None = None
        self._open: dict[Path, FileIO] = {}
        self._reports: deque[dict] = deque()
        self._shown: deque[bytes] = deque(maxlen=500)
        self._torchrun: deque[bytes] = deque(maxlen=500)
        self._muted: set[str | Path] = set()
        self._ends = False

    @property
    def torchrun(self) -> int:
        """The descriptor that torchrun gets as its output."""
        return self._write["torchrun"]

    @property
    def paths(self) -> dict[str, str]:
        """Where a rank opens its end of the others."""
        return {name: f"/proc/{os.getpid()}/fd/{self._write[name]}" for name in ("stdout", "stderr", "reports")}

    def log_to(self, path: Path) -> None:
        """The first rank's log: what it has said and will say goes there."""
        self._log = path
        early, self._early = self._early, []
        for line in early:
            self._append(path, line)

    def reports(self) -> Iterator[dict]:
        """The ranks' reports since the last call."""
        while self._reports:
            yield self._reports.popleft()

    def has_shown(self, text: str) -> bool:
        """Whether the terminal has it already."""
        return bool(text) and text.encode("utf-8", "surrogateescape") in b"".join(self._shown)

    def said_by_torchrun(self) -> str:
        """All of its words, also its last, which then go to its log: asked where it failed by itself."""
        text = b"".join(self._torchrun)
        if self._ends:
            self._append(self._folder / "torchrun.log", text)
        return text.decode("utf-8", "replace")

    def serve(self, timeout: float) -> None:
        """Waits for something to come, or a signal, and passes it on."""
        ready = {key.data for key, _ in self._selector.select(timeout)}
        if "wake" in ready:
            with contextlib.suppress(BlockingIOError):
                os.read(self._wake, _CHUNK)
        for name in ("stdout", "stderr", "torchrun", "reports"):
            if name in ready:
                self._take(name)

    def drain(self) -> None:
        """Passes on what is left; called when nobody writes any more."""
        for name in self._read:
            while self._take(name):
                pass
        for name in ("stdout", "stderr"):
            if self._partial[name]:
                self._line(name, self._partial[name] + b"\n")
                self._partial[name] = b""

    def _take(self, name: str) -> bool:
        try:
            data = os.read(self._read[name], _CHUNK)
        except BlockingIOError:
            return False
        if name in ("stdout", "stderr"):
            self._show(name, data)
        *lines, rest = (self._partial[name] + data).split(b"\n")
        # of a progress bar only what is left at its end
        self._partial[name] = rest if name == "reports" else rest[rest.rfind(b"\r", 0, -1) + 1 :]
        for line in lines:
            self._line(name, line + b"\n")
        return True

    def _line(self, name: str, line: bytes) -> None:
        if name == "reports":
            self._reports.append(json.loads(line))
            return
        line = line.rstrip(b"\r\n").rpartition(b"\r")[2] + b"\n"
        if name == "torchrun":
            self._torchrun.append(line)
            self._ends |= line.startswith(b"Traceback (most recent call last):")
            if not self._ends:  # its last word on a rank that failed, which that rank's log says better
                self._append(self._folder / "torchrun.log", line)
            return
        self._shown.append(line)
        if self._log is None:
            self._early.append(line)
        else:
            self._append(self._log, line)

    def _append(self, path: Path, line: bytes) -> None:
        if path in self._muted:
            return
        try:
            if path not in self._open:
                self._open[path] = open(path, "ab", buffering=0)
            self._open[path].write(line)
        except OSError as error:  # a full disk is the run's to report, not a reason to end it
            self._muted.add(path)
            print(f"warning: {path}: no more lines are written: {error.strerror}", file=sys.stderr)

    def _show(self, name: str, data: bytes) -> None:
        if name in self._muted:
            return
        try:
            stream = getattr(sys, name).buffer
            stream.write(data)
            stream.flush()
        except (OSError, ValueError):  # whoever read it has gone, as in `| head`; the log goes on
            self._muted.add(name)
