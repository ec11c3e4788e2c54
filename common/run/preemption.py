"""Preemption: SIGTERM or SIGUSR1 (Slurm, Kubernetes, spot hosts) asks a run to save and go; Ctrl-C asks likewise.

A training loop asks once a step, on all ranks, through its log:

    if log.preempted():                  # the same answer on all ranks, at most one step after the signal
        save(run, log)
        raise log.stopped(step)          # Status = PREEMPTED, exit status 75: start the same command again

A loop in which ranks do not keep step (an evaluation whose shares differ) runs over `until_asked(batches)`, which ends
early on a rank that was asked, and `stop_if_asked()` behind it, which raises Interrupted on all of them. A loop that
keeps step (FSDP) calls `log.preempted()` there as well.

The first signal asks; a second one, a second or more later, ends the process at once, whatever it waits for. Until a
loop has asked for the first time a signal ends the process as it would without this file, with a word in the result. An
evaluation alone has nothing to save: the first signal ends it, with exit status 75.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist

from common.distributed import barrier, gather_objects
from common.errors import PREEMPTED, Preempted
from common.run.progress import bar

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
_SAME_S = 1.0  # a launcher and its process group may both pass one signal on: within this it counts once
Item = TypeVar("Item")


class Ended(SystemExit):
    """A signal that nothing could be saved for: exit status 128 + its number."""

    def __init__(self, number: int):
        super().__init__(128 + number)
        self.number = number

    def __str__(self) -> str:
        return f"ended by {signal.Signals(self.number).name}"


class Interrupted(Exception):
    """An evaluation inside a training was asked to stop: its results are of a part."""


class Watch:
    """Signals of this process while a run lasts; a context manager of the main thread. See the file's head.

    Args:
        saves: False for an evaluation alone: it has nothing to save, so the first signal ends it at once, likewise with
            the exit status that says start me again.
    """

    def __init__(self, saves: bool = True) -> None:
        self.saves = saves
        self.number = 0  # of the signal that asked
        self.is_asked_for = False  # whether a loop looks
        self._pending: tuple[dist.Work, np.ndarray] | None = None
        self._first = 0.0

    def __enter__(self) -> Watch:
        global _current
        self._outer, _current = _current, self  # an evaluation's log may be inside a training's
        self._before: dict[int, Any] = {}
        if threading.current_thread() is not threading.main_thread():
            return self
        # A byte a signal: written by C code at once, while Python's own handlers wait for the main thread, which may be
        # inside a collective for ever.
        self._reader, self._writer = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        os.set_blocking(self._reader, True)
        self._wakeup = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        for number in SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:  # nohup and the like stay
                self._before[number] = signal.signal(number, self._handle)
        threading.Thread(target=self._end_on_second, args=(self._reader,), daemon=True).start()
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        global _current
        _current = self._outer
        if (kind is None or (kind is Preempted and self.saves)) and dist.is_initialized():
            # Nobody leaves before the main rank has written everything: a launcher ends the others when the first goes.
            with contextlib.suppress(RuntimeError):  # of a rank that is gone, which is told elsewhere
                if self._pending is not None:
                    self._pending[0].wait()
                if kind is Preempted:
                    barrier()
        if not self._before:
            return
        for number, handler in self._before.items():
            # on its way out a run that was preempted is not to be hurried by the launcher that sees the others go
            signal.signal(number, signal.SIG_IGN if kind is Preempted else handler)
        signal.set_wakeup_fd(self._wakeup)
        os.close(self._writer)  # ends the thread, which closes the other side

    def agreed(self) -> bool:
        """Whether any rank has been asked, as of the call before: all ranks call it at the same places.

        The ranks' answers travel while the next step is computed, so that nothing waits for them.
        """
        self.is_asked_for = True
        if not dist.is_initialized() or dist.get_world_size() == 1:
            return self.number != 0
        asked = 0
        if self._pending is not None:
            work, answers = self._pending
            work.wait()
            asked = int(answers[0])
        answers = np.array([self.number], dtype=np.int32)
        self._pending = (dist.all_reduce(torch.from_numpy(answers), dist.ReduceOp.MAX, async_op=True), answers)
        self.number = self.number or asked
        return asked != 0

    def stopped(self, step: int, saved: bool = True) -> Preempted:
        """What to raise once the checkpoint is written; `saved` is False of a run that keeps none."""
        name = signal.Signals(self.number or signal.SIGTERM).name
        what = "its checkpoint is written; the same command goes on from it"
        what = what if saved else "without a checkpoint, as it was told; the same command begins anew"
        message = f"{name}: stopped after step {step}, {what}"
        return Preempted(message, 128 + signal.SIGINT if self.number == signal.SIGINT else PREEMPTED)

    def _handle(self, number: int, frame: Any) -> None:
        if self.number:
            return
        self.number = number
        if not self.saves:
            name, again = signal.Signals(number).name, number != signal.SIGINT
            raise Preempted(f"{name}: the evaluation was ended, it has nothing to save", PREEMPTED if again else 130)
        if not self.is_asked_for:
            raise Ended(number)

    def _end_on_second(self, reader: int) -> None:
        with contextlib.suppress(OSError), os.fdopen(reader, "rb", buffering=0) as pipe:
            while byte := pipe.read(1):
                if byte[0] not in self._before:
                    continue
                if not self._first:
                    self._first = time.monotonic()
                    self._say(byte[0])
                elif time.monotonic() - self._first >= _SAME_S:
                    os._exit(128 + byte[0])

    def _say(self, number: int) -> None:
        if self.is_asked_for and os.environ.get("RANK", "0") == "0":
            name = signal.Signals(number).name
            text = f"{name}: the step is ended, and saved if the run keeps any; a second signal ends the run at once"
            print(text, file=sys.stderr, flush=True)


_current: Watch | None = None


def _in_forked_child() -> None:
    """A loader's worker lives until its parent ends it, also where a signal goes to the whole process group."""
    if _current is not None and _current._before:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        for number in (signal.SIGUSR1, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)


os.register_at_fork(after_in_child=_in_forked_child)


def asked() -> bool:
    """Whether this process has been asked to stop; says nothing about other ranks."""
    return _current is not None and _current.number != 0


def until_asked(batches: Iterable[Item]) -> Iterator[Item]:
    """`batches` of an evaluation up to the moment in which this process is asked to stop, with a progress bar."""
    if _current is not None:
        _current.is_asked_for = True
    for batch in bar(batches, "evaluate"):
        if asked():
            return
        yield batch


def stop_if_asked() -> None:
    """Behind a loop over `until_asked`; all ranks call it.

    Raises:
        Interrupted: on all ranks, where one has been asked to stop.
    """
    number = max(gather_objects(0 if _current is None else _current.number))
    if _current is not None and number:
        _current.number = _current.number or number
        raise Interrupted
