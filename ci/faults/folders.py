"""What a disk, a second run or a stranger does to a run's folder."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

from ci.faults.runs import NotHere, Runs, Trial, checkpoints, losses, one_line, states, wait_for_step
from common.checkpoint import digests
from common.errors import PREEMPTED

FLIPS = 20  # bits a trial, one after the other, each of which has to be noticed
TMPFS = "1g"


@contextlib.contextmanager
def small_disk(folder: Path) -> Iterator[Path]:
    """A tmpfs of its own, where one may be mounted."""
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={TMPFS}", "tmpfs", folder], capture_output=True, text=True
    )
    if mounted.returncode != 0:
        raise NotHere(f"no tmpfs may be mounted here ({' '.join(mounted.stderr.split())[:80]})")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


def fill(disk: Path) -> Path:
    """Takes all that is free; returns the file that has it."""
    ballast = disk / "ballast"
    with contextlib.suppress(OSError), open(ballast, "wb", buffering=0) as file:
        while True:
            file.write(bytes(1 << 20))
    with contextlib.suppress(OSError), open(ballast, "ab", buffering=0) as file:
        while True:
            file.write(bytes(512))
    return ballast


def full_disk(runs: Runs, draw: random.Random, whole: dict[int, float]) -> list[str]:
    """One line with path and cause, FAILED, the checkpoints that were there whole; with room again it goes on."""
    with small_disk(runs.folder / f"disk{runs.number}") as disk:
        output = disk / "output"
        process, _ = runs.start(output)
        wait_for_step(process, output, draw.randrange(3, runs.script.last // 2))
        ballast = fill(disk)
        code, said = process.wait(), runs.said()
        if code == 0:
            return ["nothing was written after the disk was full"]
        problems = one_line(said, str(disk), "No space left") + ([] if code == 1 else [f"exit code {code}"])
        if states(output) - {"FAILED"}:
            problems.append(f"Status {states(output)}")
        ballast.unlink()
        return problems + runs.goes_on(output, whole)


def read_only(runs: Runs, draw: random.Random, whole: dict[int, float]) -> list[str]:
    """Refused before anything is done."""
    with small_disk(runs.folder / f"disk{runs.number}") as disk:
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        code, said = runs.run(disk / draw.choice(["", "a", "a/b"]))
        return one_line(said, "--output_dir", str(disk)) + ([] if code == 2 else [f"exit code {code}"])


def deleted(runs: Runs, draw: random.Random, whole: dict[int, float]) -> list[str]:
    """The folder goes while the run writes to it: one line with its path; the same command begins anew."""
    output = runs.folder / f"output{runs.number}"
    process, _ = runs.start(output)
    wait_for_step(process, output, draw.randrange(1, runs.script.last // 2))
    while output.exists():
        shutil.rmtree(output, ignore_errors=True)
    code, said = process.wait(), runs.said()
    problems = one_line(said, str(output)) + ([] if code == 1 else [f"exit code {code}"])
    shutil.rmtree(output, ignore_errors=True)
    return problems + runs.goes_on(output, whole)


def flipped_bits(runs: Runs, draw: random.Random, whole: dict[int, float]) -> list[str]:
    """A bit anywhere in any file of a checkpoint is noticed; with the newest damaged a run goes on all the same."""
    output = runs.folder / f"output{runs.number}"
    shutil.copytree(runs.folder / "whole", output)
    missed = []
    for _ in range(FLIPS):
        path = draw.choice([path for path in checkpoints(output) if path.stat().st_size])
        place = flip(path, draw)
        sealed = path.parent if (path.parent / digests.SEAL).exists() else path
        if digests.damage(sealed) is None and path.name != "class_names.json":
            missed.append(f"{path.name} at {place}")
        os.utime(path)  # a damage of its own: nothing is remembered of the file before
        flip(path, place=place)
    newest = checkpoints(output)[0]
    flip(newest, draw)
    problems = [f"not noticed: {missed[:3]}"] if missed else []
    return problems + runs.goes_on(output, whole)


def flip(path: Path, draw: random.Random | None = None, place: tuple[int, int] = (0, 0)) -> tuple[int, int]:
    """Turns one bit over, a drawn one or that at `place`; returns the place."""
    content = bytearray(path.read_bytes())
    if draw is not None:
        place = (draw.randrange(len(content)), draw.randrange(8))
    content[place[0]] ^= 1 << place[1]
    path.write_bytes(content)
    return place


def two_runs(runs: Runs, draw: random.Random, whole: dict[int, float]) -> list[str]:
    """The second is refused with the first one's name, which does not notice."""
    output = runs.folder / f"output{runs.number}"
    first, _ = runs.start(output, "--max_steps", "10000000", *runs.script.endless)
    wait_for_step(first, output, draw.randrange(1, runs.script.last // 4))
    code, said = runs.run(output)
    problems = one_line(said, "belongs to the run of process") + ([] if code == 2 else [f"exit code {code}"])
    wait_for_step(first, output, max(losses(output)) + 2)
    first.send_signal(signal.SIGTERM)
    if first.wait() != PREEMPTED or states(output) != {"PREEMPTED"}:
        problems.append(f"the first: exit code {first.returncode}, Status {states(output)}")
    steps = list(losses(output))
    shutil.rmtree(output)
    return problems + ([] if steps == list(range(1, len(steps) + 1)) else ["the first one has lost or repeated steps"])


FOLDERS: dict[str, Trial] = {
    "full disk": full_disk,
    "read-only disk": read_only,
    "folder deleted": deleted,
    "flipped bits": flipped_bits,
    "two runs": two_runs,
}
