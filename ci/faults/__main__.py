"""All that can happen to a run, at random moments: is anything left, is it told, does it go on bit for bit?

    python -m ci.faults --trials 3 --seed 0 [--only Data2vec] [--kind TERM "full disk"]     a table: tried, held
    python -m ci.faults --kind fuzz --cases 100000                   every parser of ours on damaged and hostile files
    python -m ci.faults --kind soak --minutes 60 --only Data2vec     memory, open files and threads of a long run

A trial starts a project's own train_full_8p.sh with two ranks on made-up data, does one thing to it (kills.py,
folders.py, contents.py) and looks: processes, exit code, Status, TMPDIR, what was said. Then the same command is given
again, and must reach the end with the losses of the run that nobody touched.
"""

from __future__ import annotations

import argparse
import random
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from ci.faults import fuzz
from ci.faults.contents import CONTENTS
from ci.faults.folders import FOLDERS
from ci.faults.kills import KILLS
from ci.faults.runs import SCRIPTS, NotHere, Runs, Trial, losses
from ci.faults.soak import soak
from ci.training_cases import CASES, COUNTED, ROOT, short_names

TRIALS: dict[str, Trial] = {**KILLS, **FOLDERS, **CONTENTS}
REPORTS = ROOT / "ci" / "reports"


def row(what: str, kind: str, tried: int, held: int, problems: Sequence[str] = ()) -> None:
    for problem in problems:
        print(f"  {what} {kind}: {problem}", flush=True)
    print(f"{what:24} {kind:17} {tried:6} {held:6}", flush=True)


def try_project(project: str, kinds: Sequence[str], options: argparse.Namespace) -> int:
    """All kinds of faults on one project; how many trials did not hold."""
    failed = 0
    with tempfile.TemporaryDirectory(prefix="faults-data-") as data:
        CASES[project].prepare(Path(data), COUNTED)
        runs = Runs(project, Path(data))
        try:
            code, said = runs.run(runs.folder / "whole")
            if code != 0:
                print(f"error: {project}: the run that nobody touches fails:\n{said[-2000:]}", file=sys.stderr)
                return 1
            whole = losses(runs.folder / "whole")
            for kind in kinds:
                failed += try_kind(runs, kind, whole, options)
        finally:
            shutil.rmtree(runs.folder, ignore_errors=True)
    return failed


def try_kind(runs: Runs, kind: str, whole: dict[int, float], options: argparse.Namespace) -> int:
    held, problems = 0, []
    for number in range(options.trials):
        draw = random.Random(f"{options.seed} {runs.project} {kind} {number}")
        try:
            found = TRIALS[kind](runs, draw, whole)
        except NotHere as reason:
            print(f"{runs.project:24} {kind:17} skipped: {reason}", flush=True)
            return 0
        held += not found
        problems += [f"trial {number}: {problem}" for problem in found]
    row(runs.project, kind, options.trials, held, problems)
    return options.trials - held


def fuzz_all(cases: int, number: int) -> int:
    """`cases` shared out evenly over the parsers; how many did not stand theirs."""
    parsers = fuzz.parsers()
    each, failed = -(-cases // len(parsers)), 0
    for parser in parsers:
        problem = fuzz.fuzz(parser, each, number)
        failed += problem is not None
        row("fuzz", parser.name[:17], each, each if problem is None else 0, [problem] if problem else [])
    return failed


def soak_project(project: str, minutes: float) -> int:
    with tempfile.TemporaryDirectory(prefix="faults-data-") as data:
        CASES[project].prepare(Path(data), COUNTED)
        runs = Runs(project, Path(data))
        picture = REPORTS / f"soak_{project}.png"
        problems = soak(runs, minutes, picture)
        shutil.rmtree(runs.folder, ignore_errors=True)
    row(project, f"soak {minutes:g} min", 1, int(not problems), [*problems, f"drawn: {picture}"])
    return len(problems)


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="ci.faults", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    known = [*TRIALS, "fuzz", "soak"]
    parser.add_argument("--trials", type=int, default=3, help="of each kind and project; default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="of the random moments; default: %(default)s")
    parser.add_argument("--only", nargs="+", metavar="PROJECT", help=f"of {', '.join(SCRIPTS)}")
    parser.add_argument("--kind", nargs="+", choices=known, default=known, metavar="KIND", help=", ".join(known))
    parser.add_argument("--cases", type=int, default=100_000, help="of the fuzzing, in all; default: %(default)s")
    parser.add_argument("--minutes", type=float, default=60, help="of each soak; default: %(default)s")
    options = parser.parse_args(argv)
    if min(options.trials, options.cases, options.minutes) <= 0:
        parser.error("--trials, --cases and --minutes must be above 0")
    try:
        projects = short_names(options.only)
    except ValueError as error:
        parser.error(f"--only {error}")
    kinds = [kind for kind in options.kind if kind in TRIALS]
    print(f"{'':24} {'':17}  tried   held")
    failed = fuzz_all(options.cases, options.seed) if "fuzz" in options.kind else 0
    failed += sum(try_project(project, kinds, options) for project in projects) if kinds else 0
    failed += sum(soak_project(project, options.minutes) for project in projects) if "soak" in options.kind else 0
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
