"""The file `.lock` of an output folder: which run has it, and whether that run still lives.

It holds host, process and start time and is made by O_EXCL, which network disks honour too. On its own host and pid
namespace a lock is stale when that process is gone; from elsewhere when nobody has touched it for `SILENT_S` by the
disk's own clock: the owner touches it every `BEAT_S`.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
import uuid
from pathlib import Path
from typing import Any

import psutil

from common.errors import UsageError

NAME = ".lock"
BEAT_S, SILENT_S = 10.0, 60.0


def living_owner(folder: str | Path, lock: str = NAME) -> str | None:
    """The run that has a folder now, in words; None where there is none, or its lock is stale."""
    path = Path(folder) / lock
    found = _read(path)
    return None if found is None or _is_stale(path, found) else _named(found)


class Lock:
    """The lock file of this process, touched until it is let go. `what` is locked by it, in words for messages."""

    def __init__(self, path: Path, what: str = ""):
        self.path, self._let_go = path, threading.Event()
        self.what = what or f"--output_dir {path.parent}"
        process = psutil.Process()
        self.me = {
            "host": socket.gethostname(),
            "pid": process.pid,
            "started": round(process.create_time(), 2),
            "since": time.strftime("%Y-%m-%d %H:%M:%S"),
            "place": _place(),
            "token": uuid.uuid4().hex,
        }
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._take()
        except OSError as error:
            raise UsageError(f"{self.what}: cannot be written ({error.strerror})") from error
        threading.Thread(target=self._beat, daemon=True).start()

    def _take(self) -> None:
        while True:
            try:
                descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
            except FileExistsError:
                self._wait_or_refuse()
                continue
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                file.write(json.dumps(self.me))
            return

    def _wait_or_refuse(self) -> None:
        """Returns once the lock that is there is gone; raises where a living run has it."""
        found = _read(self.path)
        if found is None:
            return
        if not _is_stale(self.path, found):
            raise UsageError(
                f"{self.what} belongs to {_named(found)}: give another one, or end that run. "
                f"(If it is lost, delete {self.path})"
            )
        print(f"note: {self.what} belonged to {_named(found)}, which is no more: taken over", flush=True)
        # renamed first: of two runs that find it stale one alone moves it, and none removes the other's new lock
        aside = self.path.with_name(f"{self.path.name}.{self.me['token'][:8]}.tmp")
        with contextlib.suppress(FileNotFoundError):
            os.rename(self.path, aside)
            if _read(aside) != found:
                with contextlib.suppress(OSError):
                    os.link(aside, self.path)
            aside.unlink()

    def _beat(self) -> None:
        while not self._let_go.wait(BEAT_S):
            with contextlib.suppress(OSError):
                os.utime(self.path)

    def release(self) -> None:
        self._let_go.set()
        with contextlib.suppress(OSError):
            if (_read(self.path) or {}).get("token") == self.me["token"]:
                self.path.unlink()


def _place() -> str:
    """Where a pid means the same process: this boot of this machine, this pid namespace."""
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    return socket.gethostname()


def _read(path: Path) -> dict[str, Any] | None:
    """A lock's content; {} where it is no lock of ours (or is being written this moment), None where it is gone."""
    for attempt in range(5):
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            return content if isinstance(content, dict) else {}
        except FileNotFoundError:
            return None
        except (OSError, ValueError):
            time.sleep(0.1 * attempt)
    return {}


def _is_stale(path: Path, found: dict[str, Any]) -> bool:
    if found.get("place") == _place():
        try:
            process = psutil.Process(found["pid"])
            # a process that took over the pid has started at another time; one that was killed has given its memory
            # back, or is doing so (which takes a while), and writes nothing any more
            is_it = abs(process.create_time() - found["started"]) < 2 and process.memory_info().vms > 0
            return not is_it
        except (psutil.NoSuchProcess, KeyError):
            return True
        except psutil.AccessDenied:
            return False
    return _silence(path) > SILENT_S or _stays_silent(path)


def _silence(path: Path) -> float:
    """Seconds since the lock was touched, by the clock of its disk."""
    probe = path.with_name(f".clock.{uuid.uuid4().hex[:8]}.tmp")
    try:
        probe.touch()
        now = probe.stat().st_mtime
        probe.unlink()
        return now - path.stat().st_mtime
    except FileNotFoundError:
        return SILENT_S + 1
    except OSError:
        return 0.0


def _stays_silent(path: Path) -> bool:
    """Waits until the owner on another host gives a sign, or has given none for `SILENT_S`."""
    seen = path.stat().st_mtime if path.exists() else None
    print(f"note: {path} is of another host: waiting up to {SILENT_S:.0f} s for a sign of its run", flush=True)
    while seen is not None and _silence(path) <= SILENT_S:
        time.sleep(1.0)
        with contextlib.suppress(FileNotFoundError):
            if path.stat().st_mtime != seen:
                return False
            continue
        return True
    return True


def _named(found: dict[str, Any]) -> str:
    if not found:
        return "a run that wrote no name"
    return f"the run of process {found.get('pid')} on {found.get('host')}, there since {found.get('since')}"
