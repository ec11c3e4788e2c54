"""Runs that end before their time, in every way: is anything left, and does the same command go on bit for bit?"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

from ci.faults.runs import LIMIT_S, Runs, left_of, states, wait_for_step
from common.errors import PREEMPTED

LEFT_S = 10  # within which every process has to be gone, on a machine with nothing else to do


@dataclass(frozen=True)
class Kill:
    """One way for a run to end before its time.

    Attributes:
        who: "rank", "torchrun" or "launcher".
        codes: exit codes that are right.
    """

    who: str
    signals: tuple[signal.Signals, ...]
    codes: tuple[int, ...]

    def __call__(self, runs: Runs, draw: random.Random, whole: dict[int, float]) -> list[str]:
        output = runs.folder / f"output{runs.number}"
        process, scratch = runs.start(output)
        wait_for_step(process, output, draw.randrange(0, runs.script.last * 3 // 4))
        time.sleep(draw.uniform(0, 0.5))
        for number in self.signals:
            target = self._victim(process, scratch, draw)
            if target is not None and process.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(target, number)
            time.sleep(0.05)
        problems = self._what_is_left(process, scratch, output) + runs.goes_on(output, whole)
        shutil.rmtree(output)
        return problems

    def _what_is_left(self, process: subprocess.Popen, scratch: Path, output: Path) -> list[str]:
        begin, problems = time.monotonic(), []
        busy = max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))
        while left_of(scratch) and time.monotonic() - begin < LIMIT_S:
            time.sleep(0.05)
        seconds = time.monotonic() - begin
        for one in left_of(scratch):
            problems.append(f"{one.name()} goes on")
            one.kill()
        if seconds > LEFT_S * busy:
            problems.append(f"ended after {seconds:.0f} s")
        code = process.wait()
        code = 128 - code if code < 0 else code  # as a shell says it: of a signal that came before it was handled
        if code not in (*self.codes, 0):
            problems.append(f"exit code {code}")
        if files := [path.name for path in scratch.iterdir() if not path.name.startswith("torchinductor")]:
            problems.append(f"left in TMPDIR: {files[:3]}")
        found = states(output)
        if "RUNNING" in found or (code not in (0, PREEMPTED, 130) and "OK" in found):
            problems.append(f"Status {found}")
        return problems

    def _victim(self, launcher: subprocess.Popen, scratch: Path, draw: random.Random) -> int | None:
        """The process to hit; None where it does not exist yet, or any more."""
        if self.who == "launcher":
            return launcher.pid
        found = left_of(scratch)
        if self.who == "torchrun":
            return next((process.pid for process in found if "torch.distributed.run" in process.cmdline()), None)
        # the project's script, not the launcher (python3 -m ...), nor a loader's worker, which has its parent's words
        scripts = {p.pid for p in found if (words := p.cmdline())[:1] == ["python3"] and words[1].endswith(".py")}
        ranks = sorted(p.pid for p in found if p.pid in scripts and p.ppid() not in scripts)
        return draw.choice(ranks) if ranks else None


_POLITE = (PREEMPTED, 0)  # 0: it was done before the signal came
KILLS = {
    "KILL rank": Kill("rank", (signal.SIGKILL,), (137, 1)),
    "KILL torchrun": Kill("torchrun", (signal.SIGKILL,), (137,)),
    "KILL launcher": Kill("launcher", (signal.SIGKILL,), (137,)),
    "TERM": Kill("launcher", (signal.SIGTERM,), (*_POLITE, 143)),  # 143: no rank was training yet
    "USR1": Kill("launcher", (signal.SIGUSR1,), (*_POLITE, 138)),
    "HUP": Kill("launcher", (signal.SIGHUP,), (*_POLITE, 129)),
    "INT": Kill("launcher", (signal.SIGINT,), (0, 130)),
    "TERM twice": Kill("launcher", (signal.SIGTERM, signal.SIGTERM), (*_POLITE, 143)),
}


def kill_while_writing(runs: Runs, draw: random.Random, whole: dict[int, float]) -> list[str]:
    """All ranks are killed the moment a half-written checkpoint is there; the next start removes it, and only it."""
    output = runs.folder / f"output{runs.number}"
    process, scratch = runs.start(output)
    nth, seen = draw.randrange(1, 4), set()
    while process.poll() is None and len(seen) < nth:
        seen |= {
            p for p in output.rglob(".*") if p.name.endswith((".tmp", ".writing", ".saving")) and "acc" not in p.name
        }
    for one in left_of(scratch):
        with contextlib.suppress(Exception):
            one.kill()
    process.wait()
    problems = runs.goes_on(output, whole)
    left = [path for path in output.rglob(".*") if path.name.endswith((".tmp", ".writing", ".saving", ".lock"))]
    shutil.rmtree(output)
    return problems + ([f"left over: {left[:3]}"] if left else [])


KILLS["KILL in a write"] = kill_while_writing
