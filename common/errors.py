"""The sentence for the user: what is wrong, where, what to do. Everything uses it; it imports nothing of ours."""

from __future__ import annotations

import sys

# Exit status of a run that was asked to stop, wrote a checkpoint and wants to be started again (EX_TEMPFAIL of
# sysexits.h): the launcher returns it, and the Slurm and Volcano templates start the run anew for it.
PREEMPTED = 75


class UsageError(SystemExit):
    """A mistake the user can mend: ends the program with one `error: ...` line on stderr and exit status 2.

    A `SystemExit`, so that a long traceback does not hide the sentence the user has to read.
    """

    def __init__(self, message: str):
        super().__init__(2)
        self.message = message

    def __str__(self) -> str:
        return self.message


def print_usage_errors(main):
    """Decorator of an entry script's `main`: prints a `UsageError` as one line and exits with status 2."""

    def wrapped(*args, **kwargs):
        try:
            return main(*args, **kwargs)
        except UsageError as error:
            print(f"error: {error.message}", file=sys.stderr, flush=True)
            raise

    wrapped.__wrapped__ = main
    return wrapped
