"""Runs one rank's command with a log of its own, on cores of its own, and reports its beginning and end to run.py.

Started by run.py, through torchrun when there are several ranks; LAUNCH_RANK in the environment says what to do. Stays
as the command's parent: torchrun tells only that a rank has failed, not with which exit code. Imports nothing but the
standard library: it starts once a rank.
"""

import contextlib
import ctypes
import json
import os
import signal
import subprocess
import sys
import time

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_libc = ctypes.CDLL(None)
COLLECT_S = 600  # how long a rank that has stopped for a preemption waits to be collected
POLITE_S = 5.0  # a rank inside a collective that will never end has no ear for SIGTERM


def die_with_parent() -> None:
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def number(name: str, default: int = 0) -> int:
    return int(os.environ.get(name) or default)


class Rank:
    """The rank's command as a child process, its streams, and the signals that are passed on to it."""

    def __init__(self, task: dict):
        self.task = task
        self.rank, self.local_rank = number("RANK"), number("LOCAL_RANK")
        self.shown = not task["torchrun"] or self.local_rank == 0
        # several nodes may write to one shared folder: there logs go by rank
        by_rank = number("GROUP_WORLD_SIZE", 1) > 1
        log_id = self.rank if by_rank else number("ASCEND_DEVICE_ID") + self.local_rank
        self.log = os.path.join(task["log_dir"], f"train_{log_id}.log")
        self.attempt = number("TORCHELASTIC_RESTART_COUNT")
        self.asked = self.told_to_end = False
        self.child: subprocess.Popen | None = None

    def report(self, **what) -> None:
        """One line to run.py; short enough to arrive in one piece."""
        line = {"rank": self.rank, "local_rank": self.local_rank, "attempt": self.attempt, "log": self.log, **what}
        with open(self.task["reports"], "wb", buffering=0) as pipe:
            pipe.write(json.dumps(line).encode() + b"\n")

    def run(self) -> int:
        """The exit code for torchrun."""
        again = self.attempt > 0 or self.task["goes_on"]
        words = self.task["command"] + (self.task["on_restart"] if again else [])
        head = f"==== {time.strftime('%F %T')} rank {self.rank} of {number('WORLD_SIZE', 1)}: {self.task['title']}\n"
        with contextlib.suppress(OSError), open(self.log, "ab", buffering=0) as log:  # of a full disk the run will tell
            log.write(head.encode("utf-8", "surrogateescape"))
        if self.shown:
            streams = [open(self.task[name], "wb", buffering=0) for name in ("stdout", "stderr")]
        else:
            log = open(self.log, "ab", buffering=0)
            streams = [log, log]
        bind(self.task["cpu_bind"], self.local_rank, number("LOCAL_WORLD_SIZE", 1) if self.task["torchrun"] else 1)
        if self.task["card_indices"]:  # the program takes its local rank for the index of its card
            os.environ["LOCAL_RANK"] = str(self.task["card_indices"][self.local_rank])
        try:
            self.child = subprocess.Popen(
                words, stdin=subprocess.DEVNULL, stdout=streams[0], stderr=streams[1], preexec_fn=die_with_parent
            )
        except OSError as error:
            os.write(streams[1].fileno(), f"error: {words[0]}: cannot be started: {error.strerror}\n".encode())
            self.report(code=127)
            return 127
        self.report(pid=self.child.pid, wrapper=os.getpid(), shown=self.shown)
        code = self.child.wait()
        self.child = None
        code = 128 - code if code < 0 else code
        self.report(code=code)
        return self.end(code)

    def end(self, code: int) -> int:
        """A preempted rank is no failed one: torchrun would end the others, which may still be writing."""
        if code != self.task["preempted"] or not self.task["torchrun"]:
            return code
        if self.task["elastic"] and not self.asked:
            return code  # another node leaves: torchrun meets anew with those that stay
        deadline = time.monotonic() + COLLECT_S
        while not self.told_to_end and time.monotonic() < deadline:
            time.sleep(0.05)
        return 0

    def pass_on(self, signum: int, frame: object) -> None:
        self.asked |= signum == signal.SIGUSR1
        self.told_to_end |= signum == signal.SIGTERM
        if self.child is None or (self.asked and signum == signal.SIGTERM):
            return  # torchrun's, on seeing another node leave: a second signal would end it before its checkpoint
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.child.pid, signal.SIGKILL if signum == signal.SIGALRM else signum)
        if signum == signal.SIGTERM:
            signal.setitimer(signal.ITIMER_REAL, POLITE_S)


def bind(how: str, local_rank: int, local_size: int) -> None:
    """Gives this rank an equal share of the cores this job may use, when there are enough of them."""
    cores = sorted(os.sched_getaffinity(0))
    share = len(cores) // local_size
    if how == "auto" and local_size > 1 and share > 0:
        os.sched_setaffinity(0, cores[local_rank * share : (local_rank + 1) * share])


def main() -> None:
    die_with_parent()
    rank = Rank(json.loads(os.environ.pop("LAUNCH_RANK")))
    for signum in (signal.SIGTERM, signal.SIGUSR1, signal.SIGALRM):
        signal.signal(signum, rank.pass_on)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.exit(rank.run())


if __name__ == "__main__":
    main()
