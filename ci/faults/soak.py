"""A long run with a checkpoint every few steps: memory, open files and threads of its processes may not grow."""

from __future__ import annotations

import contextlib
import signal
import statistics
import time
from dataclasses import astuple, dataclass
from pathlib import Path

import psutil

from ci.faults.runs import LIMIT_S, Runs, left_of, wait_for_step
from common.errors import PREEMPTED
from common.run import figures

ALLOWED = {"memory_mib": 1.05, "files": 1.0, "threads": 1.0}  # the last third's median by the middle third's
SLACK = {"memory_mib": 16.0, "files": 1.0, "threads": 1.0}  # processes that begin and end beside the ranks


@dataclass(frozen=True)
class Sample:
    """Of all processes of a run together."""

    seconds: float
    memory_mib: float  # private: what is shared does not count twice
    files: int
    threads: int


def sample(scratch: Path, seconds: float) -> Sample:
    memory = files = threads = 0
    for process in left_of(scratch):
        with contextlib.suppress(psutil.Error):
            memory += process.memory_full_info().uss
            files += process.num_fds()
            threads += process.num_threads()
    return Sample(seconds, memory / 2**20, files, threads)


def soak(runs: Runs, minutes: float, picture: Path) -> list[str]:
    """Runs for so long and draws what it saw; what grew, in words."""
    output = runs.folder / "soak"
    process, scratch = runs.start(output, "--max_steps", "10000000", "--save_every", "50", *runs.script.endless)
    wait_for_step(process, output, 20)
    begin, samples = time.monotonic(), []
    while process.poll() is None and time.monotonic() - begin < 60 * minutes:
        samples.append(sample(scratch, time.monotonic() - begin))
        time.sleep(min(5.0, minutes))
    process.send_signal(signal.SIGTERM)
    code = process.wait(timeout=LIMIT_S)
    draw(samples, f"{runs.project}: two ranks, a checkpoint every 50 steps", picture)
    problems = [] if code == PREEMPTED else [f"exit code {code}: {runs.said()[-300:]}"]
    return problems + growth(samples)


def growth(samples: list[Sample]) -> list[str]:
    third = len(samples) // 3
    if third == 0:
        return ["it ended before anything could be seen"]
    found = []
    for name, share in ALLOWED.items():
        middle, last = (
            statistics.median(getattr(one, name) for one in part)
            for part in (samples[third : 2 * third], samples[2 * third :])
        )
        if last > middle * share + SLACK[name]:
            found.append(f"{name} grew from {middle:.0f} to {last:.0f}")
    return found


def draw(samples: list[Sample], title: str, picture: Path) -> None:
    seconds, *series = zip(*map(astuple, samples), strict=True)
    figure, axes = figures.new((7, 6), 3, sharex=True)
    for axis, values, name in zip(axes, series, ("memory, MiB", "open files", "threads"), strict=True):
        axis.plot([second / 60 for second in seconds], values)
        axis.set_ylabel(name)
        axis.set_ylim(bottom=0)
    axes[0].set_title(title)
    axes[-1].set_xlabel("minutes")
    figures.save(figure, picture)
