"""Stages of a long run: each a command with a folder, done once, with the seconds that it took."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from common.errors import UsageError

ROOT = Path(__file__).resolve().parents[2]
RECORD = "stage.json"


@dataclass(frozen=True)
class Stages:
    """Where stages run and what they have in common.

    Attributes:
        output: folder of all stages.
        device: auto, npu, cuda or cpu, for every script.
        on_cpu: whether a stage's seconds are those of its CPU threads, and not those that passed.
        failed: what ended a stage or the whole run; where there is something, no further stage begins.
    """

    output: Path
    device: str
    on_cpu: bool
    failed: list[BaseException] = field(default_factory=list)

    def folder(self, name: str) -> Path:
        return self.output / name

    def run(self, name: str, project: str, *commands: Sequence[object]) -> float:
        """Runs scripts of a project one after the other, unless a whole earlier run of the same ones is there.

        Their output goes to a log beside the stage's folder, which is emptied before: an unfinished stage starts anew.

        Args:
            name: of the stage, and of its folder.
            commands: file names of Python scripts with their arguments.

        Returns:
            The seconds they took, see `on_cpu`; to 0.1, as they are kept: a later stage's length is made of them.

        Raises:
            UsageError: one ended with another exit code than 0; names the log. The first of `failed`, if any.
        """
        if self.failed:
            raise self.failed[0]
        folder, wanted = self.folder(name), [[str(part) for part in command] for command in commands]
        record = folder / RECORD
        if record.is_file() and (found := json.loads(record.read_text(encoding="utf-8")))["commands"] == wanted:
            return found["seconds"]
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        log = folder.with_name(f"{folder.name}.log")  # not in it: a fresh run moves what is there aside
        log.unlink(missing_ok=True)
        print(f"{time.strftime('%H:%M:%S')} {name} begins", flush=True)
        seconds = round(sum(self._run_one(log, ROOT / project, command) for command in wanted), 1)
        record.write_text(json.dumps({"commands": wanted, "seconds": seconds}, indent=1) + "\n", "utf-8")
        print(f"{time.strftime('%H:%M:%S')} {name} took {seconds:.0f} s", flush=True)
        return seconds

    def _run_one(self, log: Path, project: Path, command: list[str]) -> float:
        # one thread a stage on a CPU: stages run side by side
        environment = os.environ | ({"OMP_NUM_THREADS": "1"} if self.on_cpu else {})
        began = time.perf_counter()
        with open(log, "a", encoding="utf-8") as file:
            run = subprocess.Popen(
                [sys.executable, *command], cwd=project, env=environment, stdout=file, stderr=subprocess.STDOUT
            )
            _, status, used = os.wait4(run.pid, 0)  # with its loader workers, which it has waited for
        code = run.returncode = os.waitstatus_to_exitcode(status)
        if code:
            self.failed.append(UsageError(f"{log}: {command[0]} ended with exit code {code}; it says why"))
            raise self.failed[-1]
        return used.ru_utime + used.ru_stime if self.on_cpu else time.perf_counter() - began
