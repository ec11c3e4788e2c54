"""Runs of a project's own train_full_8p.sh on two ranks and made-up data, and what is left of them."""

from __future__ import annotations

import contextlib
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from ci.training_cases import CASES, COUNTED, ROOT
from common.run import result_file

LIMIT_S = 600  # of anything here: it ends hangs, on a loaded machine too
MARK = "FAULTS_TRIAL"
PLANT = Path(__file__).with_name("plant")  # makes a rank's loss nan


@dataclass(frozen=True)
class Script:
    """What the script of a project needs beside its small case (training_cases.py).

    Attributes:
        last: its last step; long enough for a signal to come in between.
        flags: of the script, with {data} for the folder of made-up data.
        options: of the Python program, with {data}, too.
        weights: of the program, for a file of weights to begin with, with {file}.
    """

    last: int
    flags: tuple[str, ...]
    options: tuple[str, ...]
    weights: tuple[str, ...]
    endless: tuple[str, ...] = ()  # of the program, for as many epochs as one likes


SCRIPTS = {
    "ViT_for_PyTorch": Script(
        40,
        ("--data_path={data}", "--resume=auto"),
        ("--save_every", "3"),
        ("--load_checkpoint", "{file}"),
        ("--epochs", "100000"),
    ),
    "Beit2_for_PyTorch": Script(
        12,
        ("--data_path={data}",),
        ("--auto_resume", "--save_every", "3"),
        ("--resume", "{file}"),
        ("--epochs", "20000"),
    ),
    "CLIP_for_PyTorch": Script(
        40,
        ("--data_path={data}", "--model_path={data}/clip-roberta", "--resume=auto"),
        (
            *("--validation_file", "{data}/pairs.csv", "--do_eval", "False"),
            *("--save_every", "3", "--save_total_limit", "3"),
        ),
        ("--model_name_or_path", "{model}"),
        ("--num_train_epochs", "100000"),
    ),
    "Data2vec_for_PyTorch": Script(
        40,
        ("--data_path={data}/corpus", "--config_name=case"),
        ("checkpoint.no_save=false", "--save_every", "3"),
        ("checkpoint.finetune_from_model={file}",),
    ),
}
_OURS = {"--resume": 2, "--save_every": 2, "--no_auto_resume": 1, "--overwrite_output_dir": 1}  # words of a case


@dataclass
class Runs:
    """Runs of one project: the same command in one folder or another."""

    project: str
    data: Path
    number: int = 0
    folder: Path = field(default_factory=lambda: Path(tempfile.mkdtemp(prefix="faults-")))

    @property
    def script(self) -> Script:
        return SCRIPTS[self.project]

    def command(self, output: Path, *more: str) -> list[str]:
        case = CASES[self.project].arguments(self.data, COUNTED)
        for word, count in _OURS.items():
            if word in case:
                del case[case.index(word) : case.index(word) + count]
        words = ["bash", str(ROOT / self.project / "test" / "train_full_8p.sh"), "--nproc=2", "--device=cpu"]
        words += [flag.format(data=self.data) for flag in self.script.flags]
        words += ["--precision=fp32", f"--max_steps={self.script.last}", f"--output_dir={output}"]
        options = [option.format(data=self.data) for option in self.script.options]
        words += ["--collective_timeout=300", "--", *case, *options]
        return [*words, "--log_every", "1", "--num_workers", "1", *more]

    def start(
        self, output: Path, *more: str, environment: Mapping[str, str] | None = None
    ) -> tuple[subprocess.Popen, Path]:
        """A run with a TMPDIR of its own, and whose processes are found by their mark."""
        self.number += 1
        scratch = self.folder / f"tmp{self.number}"
        scratch.mkdir()
        variables = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
        variables |= {"OMP_NUM_THREADS": "1", "TMPDIR": str(scratch), MARK: str(scratch), **(environment or {})}
        variables["PATH"] = f"{Path(sys.executable).parent}:{variables['PATH']}"
        with open(self.folder / f"log{self.number}.txt", "ab") as log:
            process = subprocess.Popen(
                self.command(output, *more), env=variables, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                start_new_session=True,
            )  # fmt: skip
        return process, scratch

    def run(self, output: Path, *more: str, environment: Mapping[str, str] | None = None) -> tuple[int, str]:
        """To its end: exit code and what it printed."""
        process, _ = self.start(output, *more, environment=environment)
        return process.wait(), self.said()

    def said(self, number: int | None = None) -> str:
        return (self.folder / f"log{number or self.number}.txt").read_text(errors="replace")

    def goes_on(self, output: Path, whole: Mapping[int, float]) -> list[str]:
        """The same command once more: it has to end with the losses of the run that nobody touched."""
        code, said = self.run(output)
        if code != 0:
            return [f"the next start: exit code {code}: {said[-300:]}"]
        return [] if losses(output) == whole else ["other losses than the run that nobody touched"]


Trial = Callable[[Runs, random.Random, dict[int, float]], list[str]]  # what did not hold, in words; empty: all of it


class NotHere(Exception):
    """A fault that this machine, or this project, does not have; the message says why."""


def losses(output: Path) -> dict[int, float]:
    found = {}
    path = output / "metrics.jsonl"
    for text in path.read_text().splitlines() if path.exists() else []:
        with contextlib.suppress(ValueError):  # the last line of a killed run
            line = json.loads(text)
            if line.get("kind") == "train":
                found[line["step"]] = line["loss"]
    return found


def wait_for_step(process: subprocess.Popen, output: Path, step: int) -> None:
    """Until the run has logged that step, or has ended."""
    deadline = time.monotonic() + LIMIT_S
    while max(losses(output), default=0) < step and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)


def left_of(scratch: Path) -> list[psutil.Process]:
    """The processes of a run that are still there."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if process.environ().get(MARK) == str(scratch) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def states(output: Path) -> set[str | None]:
    """What the result files say."""
    return {result_file.read(path).get("Status") for path in output.glob("*_acc.log")}


def one_line(said: str, *words: str) -> list[str]:
    """Problems of how a run told of an error: one `error:` line with all `words`, and no traceback."""
    lines = [line for line in said.splitlines() if line.startswith("error: ")]
    if "Traceback (most recent call last)" in said:
        return [f"a traceback: {said[-300:]}"]
    if not any(all(word in line for word in words) for line in lines):
        return [f"no line with {', '.join(words)}: {(lines or [said[-300:]])[-1][:300]}"]
    return []


def checkpoints(output: Path) -> list[Path]:
    """The files of a run's checkpoints, newest first."""
    files = [p for p in output.rglob("*") if p.is_file() and "checkpoint" in str(p.relative_to(output))]
    kept = [p for p in files if "earlier" not in p.parts and not p.name.startswith(".")]
    return sorted(kept, key=lambda path: path.stat().st_mtime_ns, reverse=True)
