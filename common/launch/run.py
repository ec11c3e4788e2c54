"""Starts a node's ranks, owns their processes until the last of them is gone, and says how the run ended.

Called by launch.sh, which it replaces: this process is the one that the user started. It shows the first rank's output
and writes its log, passes a polite request to stop on to the ranks, ends what is left of the run whatever happened, and
writes the status into the result file. If it is killed itself, the kernel ends torchrun and the ranks (rank.py), and
its guard (processes.py) does the rest.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from common.errors import PREEMPTED
from common.launch import commands, outcome, processes, streams
from common.launch.addresses import port_is_taken
from common.launch.world import LaunchError
from common.run import result_file

STOP_SIGNALS = (signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
POLITE_S = 5.0  # from SIGTERM to SIGKILL, for ranks that know no preemption
GRACE_S = 100.0  # for ranks that do: to end their step and write a checkpoint
_LONGEST_SCRATCH = 72  # a socket's path has room for 107 bytes, and a loader puts 33 behind it
_COLLECT_S = 40  # torchrun's own patience with ranks, and some


class Run:
    """One node's part of a run, from its first process to its last."""

    def __init__(self, plan: Mapping[str, Any], options: argparse.Namespace, words: dict[str, list[str]]):
        self.plan, self.options, self.words = plan, options, words
        self.mark = uuid.uuid4().hex
        self.several = int(plan["world_size"]) > 1 and not plan["rank_variables"]
        self.elastic = self.several and plan["max_restarts"] > 0 and int(plan["nnodes"]) > 1
        self.case = outcome.Case.begin(
            options.output_dir, options.network, options.batch_size, int(plan["world_size"]), options.case_kind,
            is_first_node=plan["node_rank"] == "0",
        )  # fmt: skip
        self.ranks: dict[int, dict] = {}  # by local rank: what it reported last
        self.ended: list[outcome.Ended] = []  # of the last attempt, in order
        self.attempt = 0
        self.received: list[signal.Signals] = []
        self.signal: signal.Signals | None = None  # that the run ends for
        self.deadline: float | None = None
        self.asked = self.forced = False
        grace = os.environ.get("PREEMPTION_GRACE_S") or str(GRACE_S)
        if not re.fullmatch(r"[0-9]{1,6}(\.[0-9]*)?", grace):
            raise LaunchError(f"PREEMPTION_GRACE_S={grace}: must be a number of seconds")
        self.grace_s = float(grace)

    # -- start -------------------------------------------------------------------------------------------------------

    def start(self) -> None:
        node = int(self.plan["node_rank"])
        rank = [sys.executable, "-I", "-S", str(Path(__file__).with_name("rank.py"))]
        command = commands.node_command(self.plan, node, rank, commands.settings(self.options), sys.executable)
        self.scratch = _scratch_folder()
        self.streams = streams.Streams(Path(self.options.output_dir))
        environment = command.environment(os.environ)
        environment |= commands.common_environment(self.plan, len(os.sched_getaffinity(0)))
        environment |= {processes.MARK: self.mark, "TMPDIR": self.scratch, "LAUNCH_RANK": json.dumps(self._task())}
        # compiled kernels are worth keeping, unlike all else that is written there
        cache = os.path.join(tempfile.gettempdir(), f"torchinductor_{os.environ.get('USER') or os.getuid()}")
        environment.setdefault("TORCHINDUCTOR_CACHE_DIR", cache)
        if sys.stderr.isatty():
            environment["PROGRESS_BAR"] = "1"
        for number in STOP_SIGNALS:
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # as nohup leaves it
                signal.signal(number, lambda signum, _: self.received.append(signal.Signals(signum)))
        signal.signal(signal.SIGCHLD, lambda *_: None)  # wakes the streams
        self.process = subprocess.Popen(
            command.words,
            cwd=self.options.project_dir,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=self.streams.torchrun,
            stderr=self.streams.torchrun,
            start_new_session=True,  # Ctrl-C is for this process, which then asks the ranks
            preexec_fn=processes.die_with_parent,
        )
        self.guard = subprocess.Popen(
            [sys.executable, "-m", "common.launch.processes"],
            stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        task = {"mark": self.mark, "scratch": self.scratch, "case": self.case.as_dict()}
        self._tell_guard(json.dumps(task).encode())

    def _tell_guard(self, line: bytes, last: bool = False) -> None:
        """A guard that has gone needs no word."""
        pipe = self.guard.stdin
        assert pipe is not None
        with contextlib.suppress(OSError):
            pipe.write(line + b"\n")
            pipe.flush()
            if last:
                pipe.close()

    def _task(self) -> dict:
        """For rank.py."""
        return {
            **self.words,
            "title": " ".join(commands.quoted(word) for word in commands.redacted(self.words["command"])),
            "goes_on": self._goes_on(),
            "torchrun": self.several,
            "elastic": self.elastic,
            "preempted": PREEMPTED,
            "log_dir": self.options.output_dir,
            "card_indices": commands.card_indices(self.plan) if self.several else [],
            "cpu_bind": self.plan["cpu_bind"],
            **self.streams.paths,
        }

    def _goes_on(self) -> bool:
        """Whether this start continues a run: after a preemption, a requeue, or by --resume=auto in its folder."""
        if int(os.environ.get("SLURM_RESTART_COUNT") or 0) > 0:
            return True
        if any(result_file.read(path).get("Status") == "PREEMPTED" for path in self.case.files()):
            return True
        return self.plan["goes_on"] and any(Path(self.options.output_dir).glob("checkpoint*"))

    # -- while it runs -----------------------------------------------------------------------------------------------

    def wait(self) -> int:
        """Serves streams, reports and signals until the run's first process has ended; its exit code."""
        while self.process.poll() is None:
            self.streams.serve(timeout=1.0 if self.deadline is None else 0.2)
            self._take_reports()
            while self.received:
                self._stop(self.received.pop(0))
            if self.deadline is not None and self.signal is not None and time.monotonic() > self.deadline:
                self._force(self.signal)
        self.streams.drain()
        self._take_reports()
        return self.process.returncode

    def _take_reports(self) -> None:
        for report in self.streams.reports():
            if report["attempt"] > self.attempt:
                self._announce_restart(report["attempt"])
                self.attempt, self.ended, self.ranks = report["attempt"], [], {}
            if report["attempt"] < self.attempt:
                continue
            self.ranks[report["local_rank"]] = report
            if report.get("shown"):
                self.streams.log_to(Path(report["log"]))
            if "code" in report:
                if report["local_rank"] == 0:
                    self.streams.drain()  # its log is read for the cause
                self.ended.append(outcome.Ended(report["rank"], report["code"], report["log"]))
        self._collect_preempted()

    def _announce_restart(self, attempt: int) -> None:
        self.streams.drain()
        first = outcome.first_cause(self.ended)
        why = f"rank {first.rank} failed with exit code {first.code}: {first.cause}" if first else "a node came or left"
        say(f"{why}; all ranks start again ({attempt} of {self.plan['max_restarts']} restarts)")

    def _collect_preempted(self) -> None:
        """Ends torchrun when all ranks have stopped for a preemption: they wait for that (rank.py)."""
        if not self.several or self.forced or (self.elastic and not self.asked) or not self.preempted:
            return
        self.forced = True
        # told politely, torchrun leaves a meeting open for the nodes that stay
        self.process.send_signal(signal.SIGKILL if int(self.plan["nnodes"]) == 1 else signal.SIGTERM)
        self.deadline = time.monotonic() + _COLLECT_S

    @property
    def preempted(self) -> bool:
        own = int(self.plan["node_nproc"][int(self.plan["node_rank"])]) if self.several else 1
        return len(self.ended) == own and all(one.code == PREEMPTED for one in self.ended)

    def _stop(self, number: signal.Signals) -> None:
        """The first request asks the ranks to end their step and write a checkpoint, the second ends them at once."""
        living = [report for report in self.ranks.values() if "pid" in report]
        able = living and all(processes.catches(report["pid"], signal.SIGUSR1) for report in living)
        if self.asked or self.forced or not able:
            self._force(number, at_once=self.asked or self.forced)
            return
        self.asked, self.signal = True, number
        again = "Ctrl-C again" if number == signal.SIGINT else "a second signal"
        say(f"{number.name}: the ranks end their step and write a checkpoint; {again} ends them at once")
        for report in living:
            with contextlib.suppress(ProcessLookupError):
                os.kill(report["wrapper"], signal.SIGUSR1)
        self.deadline = time.monotonic() + self.grace_s

    def _force(self, number: signal.Signals, at_once: bool = False) -> None:
        if not self.preempted:
            self.asked, self.signal = False, number
        self.forced, self.deadline = True, None
        processes.end(self.mark, 0.0 if at_once else POLITE_S)

    # -- the end -----------------------------------------------------------------------------------------------------

    def finish(self, code: int) -> int:
        """Ends what is left, writes the status, says what failed; the exit code of the launcher."""
        processes.end(self.mark)
        self.streams.drain()
        self._take_reports()
        try:
            return self._outcome(code)
        finally:
            self._tell_guard(b"done", last=True)
            shutil.rmtree(self.scratch, ignore_errors=True)
            self.guard.wait()

    def _outcome(self, code: int) -> int:
        first = outcome.first_cause(self.ended)
        stopped = self.signal
        if self.preempted:
            outcome.conclude(self.case, "PREEMPTED", None, keep_own_words=True)
            ends_with = 128 + stopped if stopped == signal.SIGINT else PREEMPTED  # Ctrl-C: nobody is to start it again
            say(f"stopped with a checkpoint: start it again to go on (exit code {ends_with})")
            return ends_with
        if stopped is not None and code != 0 and (first is None or first.code > 128):
            say(f"error: the run was ended by a signal, {stopped.name}; logs: {self.options.output_dir}/train_*.log")
            outcome.conclude(self.case, "FAILED", f"ended by {stopped.name}")
            return 128 + stopped
        if code == 0 and first is None:
            return 0
        if first is None:
            return self._torchrun_failed(128 - code if code < 0 else code)
        self._show(first)
        error = f"rank {first.rank}: {first.cause} (exit code {first.code})"
        outcome.conclude(self.case, "FAILED", error, keep_own_words=first.rank == 0)
        return first.code

    def _torchrun_failed(self, code: int) -> int:
        port = self.plan["master_port"]
        said = self.streams.said_by_torchrun()
        if "EADDRINUSE" in said:
            reason = f"--master_port={port}: taken on this host; give another, the same on every node"
        else:
            ended = f"torchrun was ended by {signal.Signals(code - 128).name}" if code > 128 else "torchrun failed"
            reason = outcome.reason_in(said) or ended
        logs = f"{self.options.output_dir}/train_*.log"
        say(f"error: {reason}; logs: {logs}")
        outcome.conclude(self.case, "FAILED", f"{reason} (exit code {code})")
        return code

    def _show(self, first: outcome.Ended) -> None:
        """The last lines of the rank that failed first, unless they have been shown already."""
        head = f"error: rank {first.rank} failed with exit code {first.code}"
        cause = first.cause
        if self.streams.has_shown(cause):
            say(f"{head}; log: {first.log}")
            return
        say(f"{head}; last lines of {first.log}:")
        for line in outcome.log_of_run(first.log).splitlines()[-15:]:
            say(f"  | {line}")
        if first.code > 128:
            say(f"  {cause}")


def say(text: str) -> None:
    """On stderr, unless that has gone, as after a lost connection."""
    with contextlib.suppress(OSError, ValueError):
        print(text, file=sys.stderr, flush=True)


def _scratch_folder() -> str:
    """A temporary folder of the run's own, which ends with it."""
    folder = tempfile.gettempdir()
    if len(os.fsencode(folder)) + 13 > _LONGEST_SCRATCH:
        folder = "/tmp"
    return tempfile.mkdtemp(prefix="run-", dir=folder)


def check_port(plan: Mapping[str, Any]) -> None:
    """Raises LaunchError where this node is to listen on a port that is taken."""
    variables = dict(text.split("=", 1) for text in plan["rank_variables"])
    first = variables.get("RANK") == "0" if variables else int(plan["nnodes"]) > 1 and plan["node_rank"] == "0"
    if first and port_is_taken(int(plan["master_port"])):
        raise LaunchError(
            f"--master_port={plan['master_port']}: taken on this host; give another, the same on every node"
        )


def make_output_dir(folder: str) -> None:
    """Raises LaunchError where the folder cannot be made, or nothing can be written there."""
    try:
        os.makedirs(folder, exist_ok=True)
        if not os.access(folder, os.W_OK | os.X_OK):
            raise OSError(0, "nothing can be written there")
    except OSError as error:
        raise LaunchError(f"--output_dir={folder}: {error.strerror}") from None


def main() -> None:
    options, plan, words = commands.task_of_launcher(__doc__)
    try:
        check_port(plan)
        make_output_dir(options.output_dir)
        if plan["node_rank"] == "0":
            outcome.tidy(options.output_dir)
        run = Run(plan, options, words)
        run.start()
    except LaunchError as error:
        say(f"error: {error}")
        raise SystemExit(2) from None
    code = run.finish(run.wait())
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
    os._exit(code)  # a terminal that has gone must not change the exit code


if __name__ == "__main__":
    main()
