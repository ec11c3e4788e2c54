"""The report of a paired comparison: a table and a plot of the intervals as Markdown, and all numbers as JSON."""

from __future__ import annotations

import json
import math
import statistics
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from ci.gates.machine import machine
from ci.gates.paired.verdict import FAIL, INCONCLUSIVE, PASS, Interval, Rounds, slowdown
from common.run import figures

COLOURS = {PASS: "#2a7f3f", FAIL: "#c0392b", INCONCLUSIVE: "#b7791f"}
GREY = "#8a8f98"


@dataclass(frozen=True)
class Run:
    """What was compared, and the worst verdict."""

    base: str
    head: str
    device: str
    threshold: float
    planted: float
    verdict: str


@dataclass
class Row:
    """One project's outcome; intervals and speeds are None where they were not measured."""

    project: str
    size: str
    precision: str
    verdict: str = INCONCLUSIVE
    reason: str = ""
    itself: Interval | None = None
    slowdown: Interval | None = None
    rounds: int = 0
    pairs: int = 0
    ratios: Rounds = field(default_factory=list)
    base_speed: float | None = None  # samples a second, median of the pairs
    head_speed: float | None = None

    def record(self, itself: Any, both: Any | None) -> None:
        """Takes the numbers of two `gate.Comparison`s."""
        self.itself = slowdown(itself.rounds)
        self.base_speed = statistics.median(itself.speeds[0])
        if both is not None:
            self.slowdown, self.ratios = slowdown(both.rounds), both.rounds
            self.rounds, self.pairs = len(both.rounds), sum(map(len, both.rounds))
            self.base_speed, self.head_speed = (statistics.median(speeds) for speeds in both.speeds)


def write(run: Run, rows: list[Row], folder: Path) -> Path:
    """Writes report.md with its plot and report.json; returns report.md's path."""
    folder.mkdir(parents=True, exist_ok=True)
    plot = plot_ratios(run, rows, folder / "ratios.png") if any(row.itself for row in rows) else None
    (folder / "report.json").write_text(json.dumps({**asdict(run), "rows": [asdict(r) for r in rows]}, indent=1) + "\n")
    path = folder / "report.md"
    path.write_text(_markdown(run, rows, plot))
    return path


def plot_ratios(run: Run, rows: list[Row], path: Path) -> Path:
    """Each project's slowdown with its interval, every start's pairs as dots, and above it the base against itself."""
    shown = [row for row in rows if row.itself]
    figure, axes = figures.new((8, 1.4 + 0.95 * len(shown)))
    axes.axvspan(-run.threshold, run.threshold, color="#eef1f4", zorder=0)
    axes.axvline(0, color=GREY, linewidth=0.8, zorder=1)
    axes.axvline(run.threshold, color=COLOURS[FAIL], linewidth=0.9, linestyle="--", zorder=1)
    ticks, labels = [], []
    for number, row in enumerate(reversed(shown)):
        name = row.project.removesuffix("_for_PyTorch")
        _interval(axes, row.itself, number + 0.22, GREY)
        ticks, labels = [*ticks, number + 0.22, number - 0.12], [*labels, "base, itself", f"{name}: {row.verdict}"]
        if row.slowdown:
            _interval(axes, row.slowdown, number - 0.12, COLOURS[row.verdict])
            for start, pairs in enumerate(row.ratios):
                height = number - 0.2 - 0.18 * (start + 1) / len(row.ratios)
                axes.plot(
                    [100 * math.expm1(ratio) for ratio in pairs], [height] * len(pairs), ".", color=GREY, markersize=2.5
                )
    axes.set_yticks(ticks, labels)
    for tick, text in zip(axes.get_yticklabels(), labels, strict=True):
        verdict = text.rpartition(" ")[2]
        tick.set_color(COLOURS.get(verdict, GREY))
        tick.set_fontweight("bold" if verdict in COLOURS else "normal")
    axes.set_ylim(-0.55, len(shown) - 0.5)
    axes.set_xlabel("slowdown of a step in percent, head over base\nbars: 99 % interval; dots: pairs, a row a start")
    title = f"{run.head[:10]}{'+' * run.head.endswith('+')} against {run.base[:10]} on {run.device}"
    axes.set_title(title + (f", with {run.planted:g} % planted" if run.planted else ""), fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    figures.save(figure, path)
    return path


def _interval(axes: Any, interval: Interval, height: float, colour: str) -> None:
    axes.plot([interval.low, interval.high], [height, height], color=colour, linewidth=3, solid_capstyle="round")
    axes.plot(interval.median, height, "o", color="white", markeredgecolor=colour, markersize=6)


HEADER = ["project", "verdict", "slowdown of a step", "base against itself", "starts x pairs", "samples/s base, head"]


def _cells(row: Row) -> list[str]:
    speeds = "-" if row.head_speed is None else f"{row.base_speed:.2f}, {row.head_speed:.2f}"
    size = f"{row.rounds} x {row.pairs // max(row.rounds, 1)}" if row.rounds else "-"
    name = f"{row.project} ({row.size}, {row.precision})"
    return [name, row.verdict, str(row.slowdown or "-"), str(row.itself or "-"), size, speeds]


def _facts(run: Run) -> list[str]:
    clock = "CPU seconds of one thread" if run.device == "cpu" else "wall seconds, device synchronised"
    facts = [
        f"base {run.base}",
        f"head {run.head}",
        f"{machine(run.device)}, torch {torch.__version__}; {clock}",
        f"FAIL: the 99 % interval of the slowdown is above {run.threshold:g} %; PASS: it is below; a gain never fails",
    ]
    return [*facts, f"{run.planted:g} % of slowdown were planted in the head"] if run.planted else facts


def _markdown(run: Run, rows: list[Row], plot: Path | None) -> str:
    lines = [f"# Speed of a training step: {run.verdict}", "", *(f"- {fact}" for fact in _facts(run)), ""]
    lines += ["| " + " | ".join(cells) + " |" for cells in (HEADER, ["---"] * len(HEADER), *map(_cells, rows))]
    lines += ["", *(f"- **{row.verdict}** {row.project}: {_one_line(row.reason)}" for row in rows), ""]
    lines += [f"![ratios]({plot.name})\n"] if plot else []
    return "\n".join(lines)


def _one_line(text: str) -> str:
    lines = text.splitlines()
    return text if len(lines) < 2 else f"{lines[0]} {lines[-1].strip()}"
