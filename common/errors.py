"""The sentence for the user: what is wrong, where, what to do. Everything uses it; it imports nothing of ours.

Exit codes: 0 done; 1 failed while it ran; 2 a mistake the user can mend; 75 (`PREEMPTED`) stopped on a signal with its
checkpoint written: start the same command again.
"""

from __future__ import annotations

import atexit
import contextlib
import errno
import functools
import multiprocessing.util
import os
import signal
import sys
from collections.abc import Callable
from typing import NoReturn

PREEMPTED = 75  # EX_TEMPFAIL of sysexits.h, which Slurm and Volcano templates take for "requeue"
# what a disk says that the user has to look after; anything else from the system keeps its traceback
_OF_A_DISK = {
    getattr(errno, name)
    for name in "ENOSPC EDQUOT EROFS EACCES EPERM EIO ESTALE ENOENT ENOTDIR EEXIST EISDIR".split()
    if hasattr(errno, name)
}


class _Ended(SystemExit):
    """The end of the program with a message and an exit status.

    A `SystemExit`, so that a long traceback does not hide the sentence the user has to read.
    """

    def __init__(self, message: str, code: int):
        super().__init__(code)
        self.message = message

    def __str__(self) -> str:
        return self.message


class UsageError(_Ended):
    """A mistake the user can mend: ends the program with one `error: ...` line on stderr and exit status 2."""

    def __init__(self, message: str):
        super().__init__(message, 2)


class Preempted(_Ended):
    """The run stopped on a signal after its checkpoint was written: exit status 75, or 130 after Ctrl-C."""

    def __init__(self, message: str, code: int = PREEMPTED):
        super().__init__(message, code)


class RunFailed(_Ended):
    """What `print_usage_errors` makes of an error whose message is for the user: exit status 1, no traceback."""

    def __init__(self, message: str):
        super().__init__(message, 1)


def sentence(error: BaseException) -> str | None:
    """The one line that `error` has for the user; None where a programmer has to see the traceback.

    Classes whose messages are written for users say so by `for_user = True` (CheckpointError, RanksLost).
    """
    if isinstance(error, FloatingPointError) or getattr(error, "for_user", False):
        return " ".join(str(error).split())
    if isinstance(error, OSError) and error.errno in _OF_A_DISK and error.filename is not None:
        return f"{os.fspath(error.filename)}: {error.strerror}"
    return None


def name_place(error: BaseException | None, folder: str | os.PathLike[str]) -> None:
    """An error of a disk that came in the middle of a file does not know its name: it gets that of the run's folder."""
    if isinstance(error, OSError) and error.errno in _OF_A_DISK and error.filename is None:
        error.filename = os.fspath(folder)


def print_usage_errors(main):
    """Decorator of an entry script's `main`: errors that are for the user end as one `error: ...` line on stderr.

    Exit status 2 for a `UsageError`, 1 for the others of `sentence`. A script that was preempted leaves at once.
    """

    @functools.wraps(main)
    def wrapped(*args, **kwargs):
        try:
            result = main(*args, **kwargs)
            if "RANK" in os.environ and _is_the_program(main):
                # Not through the interpreter's end: a thread of gloo that asks for Python's lock there aborts the
                # process, and with it a run that was done.
                atexit._run_exitfuncs()
                _leave(0)
            return result
        except UsageError as error:
            _tell(error.message)
            raise
        except Preempted as stop:
            if main.__module__ == "__main__":
                _leave(stop.code)
            raise
        except Exception as error:
            line = sentence(error)
            if line is None:
                raise
            _tell(line)
            raise RunFailed(line) from error

    return wrapped


def _tell(message: str) -> None:
    """In one write, which other ranks' lines cannot come between; under PYTHONUNBUFFERED `print` makes two of one."""
    sys.stderr.write(f"error: {message}\n")
    sys.stderr.flush()


def _is_the_program(main: Callable) -> bool:
    """Whether `main` is of the script that Python was started with, and not of one that a profiler or a test runs."""
    words = [word for word in sys.orig_argv[1:] if not word.startswith("-")]
    script = main.__globals__.get("__file__", "")
    return main.__module__ == "__main__" and bool(words) and os.path.abspath(words[0]) == os.path.abspath(script)


def _leave(code: int) -> NoReturn:
    """Ends this process, whose work is saved. An interpreter takes seconds to take models and groups apart."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler takes a killed worker for a failure, and raises
    for child in multiprocessing.active_children():  # a loader's workers, which look for their parent every 5 seconds
        child.kill()
    # what Python does at an exit: takes their pymp-* folders out of TMPDIR
    multiprocessing.util._exit_function()  # type: ignore[attr-defined]  # typeshed leaves it out
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)
