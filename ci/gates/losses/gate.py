"""Is a loss curve the same? Two runs, two revisions, two devices, or a run and a published curve.

    python -m ci.gates.losses RUN_A RUN_B --mode refactor            # equal to the last digit
    python -m ci.gates.losses HEAD . --project ViT                   # two revisions, trained here for --steps steps
    python -m ci.gates.losses whole/ resumed/ --mode resume          # equal from where B begins
    python -m ci.gates.losses gpu/ npu/ --mode cross-device --seeds gpu-seed1/ gpu-seed2/ gpu-seed3/ --plot gap.png
    python -m ci.gates.losses published.csv npu/ --mode cross-device

A and B are logs or folders of runs (loss_files.py lists the formats), or git revisions. Modes:
- refactor: the same steps, and loss, gradient norm and learning rate equal to the last digit.
- resume: as refactor, over the steps that B has.
- cross-device: mean relative gap below --limit (2 %, as the community accepts for NPU against GPU), and no bias: the
  signed mean gap of the last third is within the spread that seeds have on one device. --seeds are further runs of A's
  setting. Without them a bias cannot be judged, and the verdict is INCONCLUSIVE unless the curves nearly coincide.

Exit code: 0 PASS, 1 FAIL, 3 INCONCLUSIVE.
"""

from __future__ import annotations

import argparse
import itertools
import math
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from ci.gates import revisions
from ci.gates.losses import loss_files
from ci.gates.losses.loss_files import Curve
from ci.gates.paired.verdict import FAIL, INCONCLUSIVE, PASS
from ci.training_cases import CASES, COUNTED, Case, short_names
from common.errors import UsageError, print_usage_errors
from common.run import figures

MODES = ("refactor", "resume", "cross-device")
EXIT_CODES = {PASS: 0, FAIL: 1, INCONCLUSIVE: 3}
SAME_START = 0.001  # relative; runs of one init and one batch are closer than that at their first step, bf16 included
NO_BIAS = 0.001  # relative; below it a bias is of no consequence and seeds need not be asked
FEWEST_LINES = 10  # of a cross-device verdict
SEEN = 0.9  # of A's steps B must reach, or its end was not compared: runs diverge late
STRETCH = 4  # times the limit, of the mean gap in any tenth of the lines: a curve that leaves and comes back


@dataclass
class Gap:
    """How far B is from A. Relative values are fractions of A's loss, positive where B is larger.

    Attributes:
        end: A's last step, which B may not have reached.
        bias: signed mean over the last third of the steps.
        diverging_step: first step whose losses differ (cross-device: by more than the limit), None if none does.
        seed_spread: largest |bias| between two runs of A's setting, None without such runs.
        differences: what a mode that asks for equality found, in words.
    """

    steps: list[int]
    a: list[float]
    b: list[float]
    end: int
    first: float
    mean: float
    largest: float
    bias: float
    diverging_step: int | None
    seed_spread: float | None = None
    differences: list[str] = field(default_factory=list)

    @property
    def relative(self) -> list[float]:
        return [_relative(a, b) for a, b in zip(self.a, self.b, strict=True)]


def _relative(a: float, b: float) -> float:
    if a == b:
        return 0.0
    if not (math.isfinite(a) and math.isfinite(b)) or a == 0:
        return math.inf
    return (b - a) / abs(a)


def bias_of(a: Curve, b: Curve) -> float:
    """Signed mean relative gap of the last third of the steps that both have."""
    _, *columns = loss_files.on_common_steps(a, b)
    gaps = [_relative(x, y) for x, y in zip(*columns, strict=True)]
    return statistics.fmean(gaps[-max(1, len(gaps) // 3) :])


def measure(a: Curve, b: Curve, mode: str, limit: float, seeds: list[Curve]) -> Gap:
    """The gap between two curves.

    Raises:
        UsageError: no step in common, or one counts steps and the other epochs.
    """
    if a.unit != b.unit:
        raise UsageError(f"{a.name} counts {a.unit}s and {b.name} {b.unit}s: compare logs of one kind")
    steps, left, right = loss_files.on_common_steps(a, b)
    if not steps:
        ranges = [f"{c.name} has {min(c.losses)} to {max(c.losses)} every {c.spacing}" for c in (a, b)]
        raise UsageError(f"no {a.unit} in common: {', '.join(ranges)}")
    gaps = [_relative(x, y) for x, y in zip(left, right, strict=True)]
    allowed = limit if mode == "cross-device" else 0.0
    diverging = next((step for step, gap in zip(steps, gaps, strict=True) if not abs(gap) <= allowed), None)
    spread = None
    if seeds:
        pairs = [abs(bias_of(x, y)) for x, y in itertools.combinations([a, *seeds], 2)]
        # one wild seed among several makes no room for others: half of all pairs stay clear of it
        spread = max(pairs) if len(pairs) <= 3 else min(max(pairs), 2 * statistics.median_low(pairs))
    size = [abs(gap) for gap in gaps]
    tail = gaps[-max(1, len(gaps) // 3) :]
    mean, bias = statistics.fmean(size), statistics.fmean(tail)
    gap = Gap(steps, left, right, max(a.losses), gaps[0], mean, max(size), bias, diverging, spread)
    if mode != "cross-device":
        gap.differences = differences(a, b, whole=mode == "refactor")
    return gap


def differences(a: Curve, b: Curve, whole: bool) -> list[str]:
    """Where two runs that should be one differ, in words; `whole`: in the steps that they have, too."""
    found = []
    missing = sorted(set(a.losses) ^ set(b.losses)) if whole else sorted(set(b.losses) - set(a.losses))
    if missing:
        found.append(
            f"{a.unit}s that only one of them has: {', '.join(map(str, missing[:5]))}" + " ..." * (len(missing) > 5)
        )
    for name in ("loss", *loss_files.OTHER_VALUES):
        x, y = ((c.losses if name == "loss" else c.others.get(name, {})) for c in (a, b))
        if bool(x) != bool(y):
            found.append(f"{name}: only one of them has it")
        unequal = [step for step in sorted(set(x) & set(y)) if not x[step] == y[step]]
        if unequal:
            step = unequal[0]
            found.append(
                f"{name}: {len(unequal)} {a.unit}s differ, the first is {step}: {x[step]!r} against {y[step]!r}"
            )
    return found


def judge(gap: Gap, mode: str, limit: float) -> tuple[str, str]:
    """(verdict, reason)."""
    if mode != "cross-device":
        if gap.differences:
            return FAIL, "; ".join(gap.differences)
        return PASS, f"identical over {len(gap.steps)} lines"
    if not all(map(math.isfinite, (*gap.a, *gap.b))):
        return FAIL, f"a loss is not finite, first at {gap.diverging_step}"
    if not gap.mean < limit:
        return FAIL, f"mean relative gap {gap.mean:.2%}, {limit:.0%} is the limit"
    if len(gap.steps) < FEWEST_LINES:
        return INCONCLUSIVE, f"{len(gap.steps)} lines in common are too few to judge by: {FEWEST_LINES} at least"
    if gap.steps[-1] < SEEN * gap.end:
        return INCONCLUSIVE, f"B ends at {gap.steps[-1]}, A at {gap.end}: what follows was not compared"
    if (apart := _worst_stretch(gap)) and apart[0] > STRETCH * limit:
        share, first, last = apart
        return (
            INCONCLUSIVE,
            f"apart by {share:.1%} between {first} and {last}, though {gap.mean:.2%} on the whole: look there",
        )
    if abs(gap.bias) <= NO_BIAS:
        return PASS, f"mean relative gap {gap.mean:.2%}, bias of the last third {gap.bias:+.3%}: none to speak of"
    if gap.seed_spread is None:
        return INCONCLUSIVE, (
            f"mean relative gap {gap.mean:.2%} is below {limit:.0%}, but the last third is biased by {gap.bias:+.2%}: "
            "give --seeds, runs of A's setting from other seeds, to see whether that is more than seeds differ"
        )
    if abs(gap.bias) > gap.seed_spread:
        return FAIL, f"biased: last third {gap.bias:+.2%}, seeds on one device differ by {gap.seed_spread:.2%} at most"
    return PASS, f"mean relative gap {gap.mean:.2%}, bias {gap.bias:+.2%} within the seeds' {gap.seed_spread:.2%}"


def _worst_stretch(gap: Gap) -> tuple[float, int, int]:
    """(mean relative gap, first and last step) of the tenth of the lines in which the curves are furthest apart."""
    width = max(1, len(gap.steps) // 10)
    sizes = [abs(_relative(x, y)) for x, y in zip(gap.a, gap.b, strict=True)]
    stretches = ((statistics.fmean(sizes[i : i + width]), i) for i in range(0, len(sizes) - width + 1))
    size, start = max(stretches)
    return size, gap.steps[start], gap.steps[start + width - 1]


# -- revisions ---------------------------------------------------------------------------------------------------------


def train_revision(revision: str, case: Case, data: Path, output: Path, steps: int, precision: str) -> Curve:
    """The curve of a project's made-up run in a revision, in fp32 or bf16, one thread, every step logged in full.

    Raises:
        UsageError: its training failed; with its last line.
    """
    options = ["--log_every", "1", "--max_steps", str(steps), "--seed", "1"]
    arguments = case.command(data, COUNTED, output, "cpu", precision, *options)
    with revisions.checkout(revision) as tree:
        command = [sys.executable, str(tree / case.project / f"{case.entry}.py"), *arguments]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        result = subprocess.run(command, cwd=tree / case.project, env=environment, capture_output=True, text=True)
    if result.returncode:
        last = (result.stderr.strip().splitlines() or ["no output"])[-1]
        raise UsageError(f"{revision}: training {case.project} failed: {last}")
    return loss_files.read(output, name=revision if revision != revisions.WORKING_TREE else "working tree")


def curves_of(options: argparse.Namespace) -> list[tuple[str, Curve, Curve]]:
    """(title, A, B) of each comparison: one of two logs, or one a project of two revisions."""
    exist = [Path(text).exists() and text != revisions.WORKING_TREE for text in (options.a, options.b)]
    if all(exist):
        return [("", loss_files.read(options.a), loss_files.read(options.b))]
    for text, exists in zip((options.a, options.b), exist, strict=True):
        if not exists and text != revisions.WORKING_TREE and not revisions.is_revision(text):
            raise UsageError(f"{text}: neither a file or folder nor a git revision")
    if any(exist):
        raise UsageError(f"{options.a} and {options.b}: give two logs or two revisions")
    try:
        projects = short_names(options.project)
    except ValueError as error:
        raise UsageError(f"--project {error}") from None
    found = []
    with tempfile.TemporaryDirectory(prefix="losses-") as folder:
        for project in projects:
            data = Path(folder) / project
            data.mkdir()
            CASES[project].prepare(data, COUNTED)
            pair = [
                train_revision(revision, CASES[project], data, data / side, options.steps, options.precision)
                for side, revision in (("a", options.a), ("b", options.b))
            ]
            found.append((project, *pair))
    return found


# -- report ------------------------------------------------------------------------------------------------------------


def describe(a: Curve, b: Curve, gap: Gap) -> str:
    spread = "not known: no --seeds" if gap.seed_spread is None else f"{gap.seed_spread:.4%}"
    rows = [
        ("A", f"{a.name}, {len(a.losses)} lines, every {a.spacing} {a.unit}s"),
        ("B", f"{b.name}, {len(b.losses)} lines, every {b.spacing} {b.unit}s"),
        ("compared", f"{len(gap.steps)} lines, {a.unit} {gap.steps[0]} to {gap.steps[-1]}"),
        (f"first {a.unit}'s gap", f"{gap.first:+.6%} ({gap.a[0]:.6f} against {gap.b[0]:.6f})"),
        ("mean relative gap", f"{gap.mean:.4%}, largest {gap.largest:.4%}"),
        ("bias of last third", f"{gap.bias:+.4%}"),
        ("spread of seeds", spread),
        ("diverging from", "nowhere" if gap.diverging_step is None else f"{a.unit} {gap.diverging_step}"),
    ]
    if abs(gap.first) > SAME_START:
        rows.append(("note", "the first losses differ: another initialisation, batch, mask or dropout draw?"))
    return "\n".join(f"  {name:<20} {text}" for name, text in rows)


def plot(a: Curve, b: Curve, gap: Gap, title: str, path: Path) -> None:
    """Both curves over the steps, and under them their relative gap with its running mean."""
    figure, (upper, lower) = figures.new((9, 6), 2, 1, sharex=True, height_ratios=(2, 1))
    many = len(gap.steps) > 200
    upper.plot(gap.steps, gap.a, color="#2b6cb0", linewidth=0.9 if many else 1.6, label=f"A: {a.name}")
    upper.plot(gap.steps, gap.b, color="#dd6b20", linewidth=0.9 if many else 1.4, alpha=0.8, label=f"B: {b.name}")
    upper.set_ylabel("loss")
    upper.legend(frameon=False)
    upper.set_title(title, fontsize=10)
    percent = [100 * value for value in gap.relative]
    lower.fill_between(gap.steps, percent, color="#a0aec0", linewidth=0, label="B - A, percent of A")
    width = max(1, len(percent) // 50)
    if width > 1:
        means = [statistics.fmean(percent[i - width + 1 : i + 1]) for i in range(width - 1, len(percent))]
        lower.plot(gap.steps[width - 1 :], means, color="#1a202c", linewidth=1.1, label=f"mean of {width} lines")
    lower.axhline(0, color="#718096", linewidth=0.8)
    third = gap.steps[-max(1, len(gap.steps) // 3)]
    lower.axvspan(third, gap.steps[-1], color="#edf2f7", zorder=0, label=f"last third: bias {gap.bias:+.3%}")
    lower.set(xlabel=a.unit, ylabel="gap, percent")
    lower.legend(frameon=False, fontsize=8, ncols=3)
    for axes in (upper, lower):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figures.save(figure, path)


def read_options(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("a", help="log, folder of a run, or git revision: the reference")
    parser.add_argument("b", help="likewise, what is to be judged; . is the working tree")
    parser.add_argument("--mode", choices=MODES, default="refactor")
    parser.add_argument("--plot", type=Path, help="draw both curves and their gap into this file")
    parser.add_argument("--seeds", nargs="+", default=[], help="cross-device: runs of A's setting from other seeds")
    parser.add_argument("--limit", type=float, default=2.0, help="cross-device: percent of the mean relative gap")
    parser.add_argument("--project", nargs="+", help="of revisions: ViT, Beit2, CLIP, Data2vec; default: all")
    parser.add_argument("--steps", type=int, default=20, help="of revisions: steps to train")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="of revisions")
    options = parser.parse_args(argv)
    if options.limit <= 0 or options.steps < 1:
        raise UsageError("--limit: above 0, --steps: at least 1")
    if options.seeds and options.mode != "cross-device":
        raise UsageError(f"--seeds: have no meaning with --mode {options.mode}, which asks for equality")
    return options


@print_usage_errors
def main(argv: list[str] | None = None) -> int:
    options = read_options(argv)
    seeds, limit = [loss_files.read(path) for path in options.seeds], options.limit / 100
    verdicts = []
    for title, a, b in curves_of(options):
        gap = measure(a, b, options.mode, limit, seeds)
        verdict, reason = judge(gap, options.mode, limit)
        print(f"{title or options.mode}\n{describe(a, b, gap)}\n{verdict}: {reason}", flush=True)
        if options.plot:
            path = options.plot.with_stem(f"{options.plot.stem}_{title}") if title else options.plot
            plot(
                a, b, gap, f"{title} {verdict}: mean gap {gap.mean:.3%}, first {a.unit} {gap.first:+.4%}".strip(), path
            )
            print(f"plot: {path}")
        verdicts.append(verdict)
    return max(EXIT_CODES[verdict] for verdict in verdicts if verdict != INCONCLUSIVE or FAIL not in verdicts)
