"""The processes of a run: found by a mark in their environment, whoever their parent is by now, and ended.

    python -m common.launch.processes     the guard: waits for the launcher's end, and ends the run if it was killed

A process tree alone does not do: torchrun starts its ranks in sessions of their own, and what a killed process leaves
belongs to init. The kernel ends ranks with their parents (rank.py); the guard and `end` see to everything else.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import shutil
import signal
import sys
import time

import psutil

from common.launch import outcome

MARK = "LAUNCH_RUN"  # names the run in the environment of each of its processes
_KILL_S = 10.0  # a process in the kernel (a hanging disk or card) ends when that lets it go, not when we want
_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_libc = ctypes.CDLL(None, use_errno=True)


def die_with_parent() -> None:
    """The kernel ends this process when the one that started it ends, in whatever way."""
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def of_run(mark: str) -> list[psutil.Process]:
    """The living processes of the run, without this one."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if process.pid != os.getpid() and process.environ().get(MARK) == mark:
                found.append(process)
    return found


def end(mark: str, polite_s: float = 0.0) -> None:
    """Ends every process of the run: by SIGTERM, and by SIGKILL what is left after `polite_s` seconds.

    (Nothing is waited for by psutil, which would take the exit code of this process's own children.)
    """
    begin = time.monotonic()
    if polite_s:
        _signal_all(of_run(mark), signal.SIGTERM)
    # what is being forked while we look is found the next time
    while (processes := of_run(mark)) and time.monotonic() - begin < polite_s + _KILL_S:
        if time.monotonic() - begin >= polite_s:
            _signal_all(processes, signal.SIGKILL)
        time.sleep(0.05)


def _signal_all(processes: list[psutil.Process], number: signal.Signals) -> None:
    for process in processes:
        with contextlib.suppress(psutil.Error):
            process.send_signal(number)


def catches(pid: int, number: signal.Signals) -> bool:
    """Whether the process has a handler for the signal."""
    try:
        with open(f"/proc/{pid}/status", encoding="ascii", errors="replace") as file:
            caught = next(line.split()[1] for line in file if line.startswith("SigCgt:"))
    except (OSError, StopIteration):
        return False
    return bool(int(caught, 16) >> (number - 1) & 1)


def guard() -> None:
    """Reads what to do from stdin, waits there for the launcher's end, and cleans up unless it said that it has."""
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    task = json.loads(sys.stdin.readline())
    if sys.stdin.readline():  # "done"; nothing when the launcher was killed
        return
    end(task["mark"])
    time.sleep(0.1)
    shutil.rmtree(task["scratch"], ignore_errors=True)
    outcome.conclude(outcome.Case(**task["case"]), "FAILED", "the launcher was killed, and its ranks with it")


if __name__ == "__main__":
    guard()
