"""Is a training step slower than before? Two revisions by turns on one device: `make perf`.

    python -m ci.gates.paired                        # the working tree against the merge base, projects that it touches
    python -m ci.gates.paired v1.0 HEAD --project ViT CLIP --device cuda --precision bf16
    python -m ci.gates.paired HEAD HEAD --project ViT --plant 10    # does this host find a step that is 10 % slower?

Each revision trains in a process of its own, which stops at the end of a step until its turn comes: A B B A in blocks
of steps, several starts of both. On a CPU one thread's CPU seconds count, on an accelerator the synchronised wall
clock. First the base runs against itself: a host that sees a difference there is told so and judges nothing. The
verdict is one-sided with a threshold of 3 %: FAIL when the 99 % interval of the slowdown lies above it, PASS when it
lies below it, else INCONCLUSIVE after the number of starts has been doubled up to a limit. It ends within ten minutes,
or --minutes, which the projects share: a question that is still open then is INCONCLUSIVE.

Exit code: 0 PASS, 1 FAIL, 3 INCONCLUSIVE. The report is written to ci/reports/perf/.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

from ci.gates import revisions
from ci.gates.paired import report as perf_report
from ci.gates.paired.verdict import FAIL, INCONCLUSIVE, PASS, Interval, Rounds, slowdown, verdict, why_untrusted
from ci.training_cases import CASES, COUNTED, FULL, SIZES, TIMED, Case, short_names
from common.errors import UsageError, print_usage_errors

EXIT_CODES = {PASS: 0, FAIL: 1, INCONCLUSIVE: 3}
REPORTS = revisions.ROOT / "ci" / "reports" / "perf"
START_TIMEOUT_S, BLOCK_TIMEOUT_S = 900, 600


class WorkerDied(RuntimeError):
    """The training of one side ended by itself; the message has its last lines."""


class Stepper(Protocol):
    """Something that does steps and says how long they took."""

    def run(self, steps: int) -> tuple[float, int]:
        """(seconds, samples) of that many further steps."""

    def close(self) -> None: ...


StartPair = Callable[[], tuple[Stepper, Stepper]]


@dataclass(frozen=True)
class Plan:
    """How much is measured.

    Attributes:
        pairs: ABBA quadruples a round.
        rounds: starts of both sides before the first verdict; doubled while it is INCONCLUSIVE.
        max_rounds: where that ends.
        block_s: seconds that a block of steps should last.
        threshold: percent.
        end: of the clock `time.monotonic`; no round begins that is likely to end later.
    """

    pairs: int = 6
    rounds: int = 4
    max_rounds: int = 16
    block_s: float = 1.0
    threshold: float = 3.0
    end: float = math.inf

    def within(self, share: float) -> Plan:
        """The same, for a share of the time that is left."""
        now = time.monotonic()
        return replace(self, end=now + share * (self.end - now))


@dataclass
class Comparison:
    """What was measured of a pair of programs: logarithms of B over A, and each side's samples a second."""

    rounds: Rounds = field(default_factory=list)
    speeds: tuple[list[float], list[float]] = field(default_factory=lambda: ([], []))


# -- measuring ---------------------------------------------------------------------------------------------------------


class Worker:
    """A started step_worker.py."""

    def __init__(self, tree: Path, case: Case, arguments: list[str], device: str, log: Path, plant: float = 0.0):
        self._log = log
        read, write = os.pipe()
        script = Path(__file__).with_name("step_worker.py")
        command = [sys.executable, str(script), "--tree", str(tree), "--project", case.project, "--entry", case.entry]
        command += ["--device", device, "--plant", str(plant), "--reply_fd", str(write), "--", *arguments]
        environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "RANK_ID")}
        if device == "cpu":
            environment["OMP_NUM_THREADS"] = "1"
        with open(log, "w") as output:
            self._process = subprocess.Popen(
                command, cwd=tree, env=environment, pass_fds=[write], text=True,
                stdin=subprocess.PIPE, stdout=output, stderr=subprocess.STDOUT,
            )  # fmt: skip
        os.close(write)
        self._reply = os.fdopen(read)

    def wait_until_warm(self) -> None:
        self._read(START_TIMEOUT_S)

    def run(self, steps: int) -> tuple[float, int]:
        self._process.stdin.write(json.dumps({"steps": steps}) + "\n")
        self._process.stdin.flush()
        answer = self._read(BLOCK_TIMEOUT_S)
        return answer["seconds"], answer["samples"]

    def close(self) -> None:
        self._process.stdin.close()
        self._reply.close()
        try:
            self._process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _read(self, timeout_s: float) -> dict:
        ready, _, _ = select.select([self._reply], [], [], timeout_s)
        line = self._reply.readline() if ready else ""
        if not line:
            if not ready:
                self._process.kill()
            self._process.wait()  # it has then written all it has to say
            what = "ended" if ready else f"did not answer for {timeout_s:g} s"
            tail = "\n".join(self._log.read_text(errors="replace").splitlines()[-8:])
            raise WorkerDied(f"the training {what}:\n{tail}")
        return json.loads(line)


def measure_round(a: Stepper, b: Stepper, plan: Plan, comparison: Comparison) -> None:
    """ABBA quadruples of two running programs; both do the same steps, so data and random draws are the same."""
    seconds, _ = a.run(1)
    b.run(1)
    steps = max(1, math.ceil(plan.block_s / max(seconds, 1e-9)))
    ratios = []
    for number in range(plan.pairs):
        first, second = (a, b) if number % 2 == 0 else (b, a)
        one, two = first.run(steps), second.run(steps)
        three, four = second.run(steps), first.run(steps)
        outer, inner = (one[0] + four[0], one[1] + four[1]), (two[0] + three[0], two[1] + three[1])
        side_a, side_b = (outer, inner) if number % 2 == 0 else (inner, outer)
        ratios.append(math.log(side_b[0] / side_a[0]))
        comparison.speeds[0].append(side_a[1] / side_a[0])
        comparison.speeds[1].append(side_b[1] / side_b[0])
    comparison.rounds.append(ratios)


def measure(
    start: Callable[[], tuple[Stepper, Stepper]], plan: Plan, settled: Callable[[Interval], bool]
) -> Comparison:
    """Rounds, each with newly started programs, until the interval settles the question or a limit is reached."""
    comparison, wanted, longest = Comparison(), plan.rounds, 0.0
    while True:
        while len(comparison.rounds) < wanted:
            began = time.monotonic()
            if began + longest > plan.end:
                return comparison
            a, b = start()
            try:
                measure_round(a, b, plan, comparison)
            finally:
                a.close()
                b.close()
            longest = max(longest, time.monotonic() - began)
        if wanted >= plan.max_rounds or settled(slowdown(comparison.rounds)):
            return comparison
        wanted = min(2 * wanted, plan.max_rounds)


def judge(start_base: StartPair, start_both: StartPair, plan: Plan) -> tuple[str, str, Comparison, Comparison | None]:
    """(verdict, reason, base against itself, base against head); the last is None on a host that cannot judge."""
    itself = measure(start_base, plan.within(0.5), lambda interval: why_untrusted(interval, plan.threshold) is None)
    if len(itself.rounds) < 2:
        return INCONCLUSIVE, "the time was over before this host could be measured: give more --minutes", itself, None
    reason = why_untrusted(slowdown(itself.rounds), plan.threshold)
    if reason:
        return INCONCLUSIVE, reason, itself, None
    both = measure(start_both, plan, lambda interval: verdict(interval, plan.threshold) != INCONCLUSIVE)
    if len(both.rounds) < 2:
        return INCONCLUSIVE, "the time was over before the head was measured: give more --minutes", itself, None
    interval = slowdown(both.rounds)
    outcome = verdict(interval, plan.threshold)
    relation = {PASS: "below", FAIL: "above", INCONCLUSIVE: "around"}[outcome]
    return outcome, f"a step takes {interval}, {relation} {plan.threshold:g} %", itself, both


# -- one project -------------------------------------------------------------------------------------------------------


def compare_project(
    project: str, trees: tuple[Path, Path], plan: Plan, size: str, device: str, precision: str, plant: float
) -> perf_report.Row:
    """Prepares the data once, for both revisions, and judges."""
    case = CASES[project]
    with tempfile.TemporaryDirectory(prefix="perf-") as name:
        folder = Path(name)
        case.prepare(folder, size)

        def start(*sides: tuple[str, Path, float]) -> tuple[Worker, Worker]:
            workers = []
            for label, tree, planted in sides:
                arguments = case.command(folder, size, folder / f"run-{label}", device, precision)
                workers.append(Worker(tree, case, arguments, device, folder / f"{label}.log", planted))
            try:
                for (label, _, _), worker in zip(sides, workers, strict=True):
                    try:
                        worker.wait_until_warm()
                    except WorkerDied as error:
                        raise WorkerDied(f"{label}: {error}") from None
            except BaseException:
                for worker in workers:
                    worker.close()
                raise
            return workers[0], workers[1]

        base, head = ("base", trees[0], 0.0), ("head", trees[1], plant)
        row = perf_report.Row(project, size, precision)
        try:
            row.verdict, row.reason, itself, both = judge(
                lambda: start(base, ("base again", trees[0], 0.0)), lambda: start(base, head), plan
            )
        except WorkerDied as error:
            row.verdict = FAIL if str(error).startswith("head") else INCONCLUSIVE
            row.reason = str(error)
            return row
    if len(itself.rounds) > 1:
        row.record(itself, both)
    return row


def worst(verdicts: list[str]) -> str:
    return next((v for v in (FAIL, INCONCLUSIVE) if v in verdicts), PASS)


def read_options(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", nargs="?", help="git revision; default: where the change began")
    parser.add_argument("head", nargs="?", default=revisions.WORKING_TREE, help="default: the working tree")
    parser.add_argument(
        "--project", nargs="+", help="ViT, Beit2, CLIP, Data2vec; default: those that the change touches"
    )
    parser.add_argument("--device", choices=("cpu", "cuda", "npu"), default="cpu")
    parser.add_argument("--precision", choices=("fp32", "bf16", "fp16"), help="default: fp32 on a CPU, else bf16")
    parser.add_argument("--size", choices=SIZES, help=f"default: {TIMED} on a CPU, else {FULL}; {COUNTED} is tiny")
    parser.add_argument("--plant", type=float, default=0.0, metavar="PERCENT", help="slow the head down, as a test")
    parser.add_argument("--threshold", type=float, default=Plan.threshold, metavar="PERCENT")
    parser.add_argument("--pairs", type=int, default=Plan.pairs, help="ABBA quadruples a start")
    parser.add_argument("--rounds", type=int, default=Plan.rounds, help="starts before the first verdict, 2 or more")
    parser.add_argument("--max_rounds", type=int, default=Plan.max_rounds)
    parser.add_argument("--minutes", type=float, default=10, help="for all projects together")
    parser.add_argument("--block_s", type=float, default=Plan.block_s, help="seconds of a block of steps")
    parser.add_argument("--reports", type=Path, default=REPORTS, help="folder of the report")
    options = parser.parse_args(argv)
    if options.rounds < 2 or options.max_rounds < options.rounds or options.pairs < 1:
        raise UsageError("--rounds: at least 2, --max_rounds: not below it, --pairs: at least 1")
    if not 0 <= options.plant <= 1000 or min(options.threshold, options.block_s, options.minutes) <= 0:
        raise UsageError("--plant: 0 to 1000 percent; --threshold, --block_s, --minutes: above 0")
    return options


@print_usage_errors
def main(argv: list[str] | None = None) -> int:
    options = read_options(argv)
    base = options.base or revisions.base_of_change()
    commits = revisions.commit_of(base), revisions.commit_of(options.head)
    try:
        projects = short_names(options.project) if options.project else revisions.touched_projects(base, options.head)
    except ValueError as error:
        raise UsageError(f"--project {error}") from None
    if not projects:
        print(f"PASS: nothing that trains differs between {commits[0][:12]} and {commits[1][:12]}")
        return EXIT_CODES[PASS]
    end = time.monotonic() + 60 * options.minutes
    plan = Plan(options.pairs, options.rounds, options.max_rounds, options.block_s, options.threshold, end)
    print(
        f"{', '.join(projects)}: PASS, FAIL or INCONCLUSIVE within {options.minutes:g} minutes"
        + (f", {options.minutes / len(projects):.1f} each" if len(projects) > 1 else ""),
        flush=True,
    )
    size = options.size or (TIMED if options.device == "cpu" else FULL)
    precision = options.precision or ("fp32" if options.device == "cpu" else "bf16")
    rows = []
    with revisions.checkout(base) as tree_a, revisions.checkout(options.head) as tree_b:
        for number, project in enumerate(projects):
            trees, share = (tree_a, tree_b), plan.within(1 / (len(projects) - number))
            row = compare_project(project, trees, share, size, options.device, precision, options.plant / 100)
            print(f"{row.verdict} {project}: {row.reason}", flush=True)
            rows.append(row)
    outcome = worst([row.verdict for row in rows])
    run = perf_report.Run(commits[0], commits[1], options.device, options.threshold, options.plant, outcome)
    print(f"{outcome}; report: {perf_report.write(run, rows, options.reports)}")
    return EXIT_CODES[outcome]
