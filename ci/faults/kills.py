"""A run of every kind of end at a random moment: is anything left, and does the same command go on bit for bit?

    python -m ci.faults --trials 3 --seed 0 [--only Data2vec] [--kind TERM]    a table: tried, held

Each trial starts a project's own train_full_8p.sh with two ranks on made-up data, ends it at a random moment (a rank,
torchrun or the launcher is killed, or the launcher gets a signal), and looks: processes, exit code, Status, TMPDIR.
Then the same command is given again, and must reach the end with the losses of the run that nobody touched.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from ci.training_cases import CASES, COUNTED, ROOT, short_names
from common import result_file
from common.errors import PREEMPTED

LAST_STEP = 40
LIMIT_S = 600  # of anything here: it ends hangs, on a loaded machine too
LEFT_S = 10  # within which every process has to be gone, on a machine with nothing else to do
MARK = "FAULTS_TRIAL"


@dataclass(frozen=True)
class Kind:
    """One way for a run to end before its time."""

    who: str  # "rank", "torchrun" or "launcher"
    signals: tuple[signal.Signals, ...]
    codes: tuple[int, ...]  # exit codes that are right


_POLITE = (PREEMPTED, 0)  # 0: it was done before the signal came
KINDS = {
    "KILL rank": Kind("rank", (signal.SIGKILL,), (137, 1)),
    "KILL torchrun": Kind("torchrun", (signal.SIGKILL,), (137,)),
    "KILL launcher": Kind("launcher", (signal.SIGKILL,), (-9,)),
    "TERM": Kind("launcher", (signal.SIGTERM,), (*_POLITE, 143)),  # 143: no rank was training yet
    "USR1": Kind("launcher", (signal.SIGUSR1,), (*_POLITE, 138)),
    "HUP": Kind("launcher", (signal.SIGHUP,), (*_POLITE, 129)),
    "INT": Kind("launcher", (signal.SIGINT,), (0, 130)),
    "TERM twice": Kind("launcher", (signal.SIGTERM, signal.SIGTERM), (*_POLITE, 143)),
}
OPTIONS = {
    "ViT_for_PyTorch": (["--resume=auto"], ["--save_every", "3"]),
    "Data2vec_for_PyTorch": (["--config_name=case"], ["checkpoint.no_save=false", "--save_every", "3"]),
}


@dataclass
class Runs:
    """Runs of one project: the same command in one folder or another."""

    project: str
    data: Path
    number: int = 0
    folder: Path = field(default_factory=lambda: Path(tempfile.mkdtemp(prefix="faults-")))

    def command(self, output: Path) -> list[str]:
        case = CASES[self.project].arguments(self.data, COUNTED)
        flags, options = OPTIONS[self.project]
        if "--resume" in case:
            del case[case.index("--resume") : case.index("--resume") + 2]
        if "--save_every" in case:
            del case[case.index("--save_every") : case.index("--save_every") + 2]
        words = ["bash", str(ROOT / self.project / "test" / "train_full_8p.sh"), "--nproc=2", "--device=cpu"]
        words += [f"--data_path={self.data / ('corpus' if 'Data2vec' in self.project else '')}", "--precision=fp32"]
        words += [f"--max_steps={LAST_STEP}", f"--output_dir={output}", "--collective_timeout=300", *flags]
        return [*words, "--", *case, *options, "--log_every", "1", "--num_workers", "1"]

    def start(self, output: Path) -> tuple[subprocess.Popen, Path]:
        """A run with a TMPDIR of its own, and whose processes are found by their mark."""
        self.number += 1
        scratch = self.folder / f"tmp{self.number}"
        scratch.mkdir()
        environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
        environment |= {"OMP_NUM_THREADS": "1", "TMPDIR": str(scratch), MARK: str(scratch)}
        environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
        log = open(self.folder / f"log{self.number}.txt", "ab")
        process = subprocess.Popen(
            self.command(output), env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            start_new_session=True,
        )  # fmt: skip
        log.close()
        return process, scratch

    def tail(self) -> str:
        return (self.folder / f"log{self.number}.txt").read_text(errors="replace")[-2000:]


def losses(output: Path) -> dict[int, float]:
    found = {}
    path = output / "metrics.jsonl"
    for text in path.read_text().splitlines() if path.exists() else []:
        with contextlib.suppress(ValueError):  # the last line of a killed run
            line = json.loads(text)
            if line.get("kind") == "train":
                found[line["step"]] = line["loss"]
    return found


def left_of(scratch: Path) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if process.environ().get(MARK) == str(scratch) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def victim(kind: Kind, launcher: subprocess.Popen, scratch: Path, draw: random.Random) -> int | None:
    """The process to hit; None where it does not exist yet, or any more."""
    if kind.who == "launcher":
        return launcher.pid
    words = {process.pid: process.cmdline() for process in left_of(scratch)}
    if kind.who == "torchrun":
        return next((pid for pid, line in words.items() if "torch.distributed.run" in line), None)
    ranks = sorted(pid for pid, line in words.items() if "--output_dir" in line and line[:1] == ["python3"])
    return draw.choice(ranks) if ranks else None


def trial(runs: Runs, kind: Kind, draw: random.Random, whole: dict[int, float]) -> list[str]:
    """What did not hold, in words; empty = all of it."""
    output = runs.folder / f"output{runs.number}"
    process, scratch = runs.start(output)
    step, deadline = draw.randrange(0, LAST_STEP - 10), time.monotonic() + LIMIT_S
    while max(losses(output), default=0) < step and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(draw.uniform(0, 0.5))
    for number in kind.signals:
        target = victim(kind, process, scratch, draw)
        if target is not None and process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(target, number)
        time.sleep(0.05)
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
    if code not in (*kind.codes, 0):
        problems.append(f"exit code {code}")
    if files := [path.name for path in scratch.iterdir() if not path.name.startswith("torchinductor")]:
        problems.append(f"left in TMPDIR: {files[:3]}")
    states = {result_file.read(path).get("Status") for path in output.glob("*_acc.log")}
    if "RUNNING" in states or (code not in (0, PREEMPTED, 130) and "OK" in states):
        problems.append(f"Status {states}")
    again, _ = runs.start(output)
    if again.wait() != 0:
        return [*problems, f"the next start: exit code {again.returncode}: {runs.tail()[-300:]}"]
    if losses(output) != whole:
        problems.append("other losses than the run that nobody touched")
    shutil.rmtree(output)
    return problems


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="ci.faults", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--trials", type=int, default=3, help="of each kind and project; default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="of the random moments; default: %(default)s")
    parser.add_argument("--only", nargs="+", metavar="PROJECT", help=f"of {', '.join(OPTIONS)}")
    parser.add_argument("--kind", nargs="+", choices=KINDS, default=list(KINDS))
    options = parser.parse_args(argv)
    projects = [name for name in short_names(options.only) if name in OPTIONS]
    if not projects or options.trials < 1:
        parser.error(f"nothing to try: --trials of at least 1, --only of {', '.join(OPTIONS)}")
    failed = 0
    print(f"{'project':22} {'kind':15} tried  held")
    for project in projects:
        with tempfile.TemporaryDirectory(prefix="faults-data-") as data:
            CASES[project].prepare(Path(data), COUNTED)
            runs = Runs(project, Path(data))
            process, _ = runs.start(runs.folder / "whole")
            if process.wait() != 0:
                print(f"error: {project}: the run that nobody touches fails:\n{runs.tail()}", file=sys.stderr)
                return 1
            whole = losses(runs.folder / "whole")
            for name in options.kind:
                held = 0
                for number in range(options.trials):
                    draw = random.Random(f"{options.seed} {project} {name} {number}")
                    problems = trial(runs, KINDS[name], draw, whole)
                    held += not problems
                    for problem in problems:
                        print(f"  {project} {name}, trial {number}: {problem}", flush=True)
                failed += options.trials - held
                print(f"{project:22} {name:15} {options.trials:5} {held:5}", flush=True)
            shutil.rmtree(runs.folder)
    return int(failed > 0)
