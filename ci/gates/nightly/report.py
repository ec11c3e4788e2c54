"""The report of perf_ab.py: one table and two plots, as Markdown and as one HTML file, and the history of speeds."""

from __future__ import annotations

import base64
import html
import json
import math
import statistics
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from ci.gates.machine import machine
from ci.gates.paired.verdict import FAIL, INCONCLUSIVE, PASS, Interval, Rounds, slowdown

COLOURS = {PASS: "#2a7f3f", FAIL: "#c0392b", INCONCLUSIVE: "#b7791f"}
GREY = "#8a8f98"
KEPT_RUNS = 60  # of the history, in the plot


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
        """Takes the numbers of two `perf_ab.Comparison`s."""
        self.itself = slowdown(itself.rounds)
        self.base_speed = statistics.median(itself.speeds[0])
        if both is not None:
            self.slowdown, self.ratios = slowdown(both.rounds), both.rounds
            self.rounds, self.pairs = len(both.rounds), sum(map(len, both.rounds))
            self.base_speed, self.head_speed = (statistics.median(speeds) for speeds in both.speeds)


def write(run: Run, rows: list[Row], folder: Path) -> Path:
    """Writes report.md, report.html, their plots and report.json, adds to history.jsonl; returns report.md's path."""
    folder.mkdir(parents=True, exist_ok=True)
    history = _history(run, rows, folder / "history.jsonl")
    plots = {}
    if any(row.itself for row in rows):
        plots["ratios.png"] = plot_ratios(run, rows, folder / "ratios.png")
    if history:
        plots["history.png"] = plot_history(history, folder / "history.png", _unit(run.device))
    (folder / "report.json").write_text(json.dumps({**asdict(run), "rows": [asdict(r) for r in rows]}, indent=1) + "\n")
    (folder / "report.html").write_text(_html(run, rows, plots))
    path = folder / "report.md"
    path.write_text(_markdown(run, rows, plots))
    return path


def _history(run: Run, rows: list[Row], path: Path) -> list[dict]:
    """Adds this run's speeds of the head and returns the lines of this machine and these cases, oldest first."""
    key = {"device": run.device, "machine": machine(run.device), "torch": torch.__version__}
    with open(path, "a", encoding="utf-8") as file:
        for row in rows:
            if row.head_speed is not None and not run.planted:
                case = {"project": row.project, "size": row.size, "precision": row.precision}
                line = {"time": int(time.time()), "commit": run.head, **key, **case, "speed": row.head_speed}
                file.write(json.dumps(line) + "\n")
    lines = [json.loads(text) for text in path.read_text(encoding="utf-8").splitlines()]
    cases = {(row.project, row.size, row.precision) for row in rows}
    wanted = [line for line in lines if {k: line[k] for k in key} == key]
    return [line for line in wanted if (line["project"], line["size"], line["precision"]) in cases]


def _unit(device: str) -> str:
    return "samples a CPU second, one thread" if device == "cpu" else "samples a second"


# -- plots -------------------------------------------------------------------------------------------------------------


def _pyplot():
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def plot_ratios(run: Run, rows: list[Row], path: Path) -> Path:
    """Each project's slowdown with its interval, every start's pairs as dots, and above it the base against itself."""
    pyplot = _pyplot()
    shown = [row for row in rows if row.itself]
    figure, axes = pyplot.subplots(figsize=(8, 1.4 + 0.95 * len(shown)), layout="constrained")
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
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return path


def _interval(axes: Any, interval: Interval, height: float, colour: str) -> None:
    axes.plot([interval.low, interval.high], [height, height], color=colour, linewidth=3, solid_capstyle="round")
    axes.plot(interval.median, height, "o", color="white", markeredgecolor=colour, markersize=6)


def plot_history(history: list[dict], path: Path, unit: str) -> Path:
    """Speeds over the runs on one machine, a panel a case, oldest first.

    Args:
        history: {"project", "size", "precision", "commit", "speed", "machine"} of every run.
        unit: of the speeds, in words.
    """
    pyplot = _pyplot()
    cases = list(dict.fromkeys((line["project"], line["size"], line["precision"]) for line in history))
    columns = min(2, len(cases))
    lines_of_panels = -(-len(cases) // columns)
    size = (4.4 * columns, 0.5 + 2.3 * lines_of_panels)
    figure, grid = pyplot.subplots(lines_of_panels, columns, figsize=size, squeeze=False, layout="constrained")
    for axes, case in zip(grid.flat, cases, strict=False):
        lines = [line for line in history if (line["project"], line["size"], line["precision"]) == case][-KEPT_RUNS:]
        speeds = [line["speed"] for line in lines]
        axes.plot(range(len(lines)), speeds, "o-", color="#2b6cb0", markersize=4, linewidth=1.2)
        axes.set_ylim(0, 1.15 * max(speeds))
        step = max(1, len(lines) // 6)
        marks = range(0, len(lines), step)
        axes.set_xticks(marks, [lines[i]["commit"][:7] + "+" * lines[i]["commit"].endswith("+") for i in marks])
        axes.tick_params(labelsize=7)
        axes.set_title(f"{case[0].removesuffix('_for_PyTorch')}, {case[1]}, {case[2]}", fontsize=9)
        axes.grid(axis="y", alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in list(grid.flat)[len(cases) :]:
        axes.set_visible(False)
    figure.supylabel(unit, fontsize=9)
    figure.suptitle(f"Speed by run: {history[0]['machine']}", fontsize=9)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return path


# -- text --------------------------------------------------------------------------------------------------------------

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


def _markdown(run: Run, rows: list[Row], plots: dict[str, Path]) -> str:
    lines = [f"# Speed of a training step: {run.verdict}", "", *(f"- {fact}" for fact in _facts(run)), ""]
    lines += ["| " + " | ".join(cells) + " |" for cells in (HEADER, ["---"] * len(HEADER), *map(_cells, rows))]
    lines += ["", *(f"- **{row.verdict}** {row.project}: {_one_line(row.reason)}" for row in rows), ""]
    lines += [f"![{name.removesuffix('.png')}]({name})\n" for name in plots]
    return "\n".join(lines)


def _one_line(text: str) -> str:
    lines = text.splitlines()
    return text if len(lines) < 2 else f"{lines[0]} {lines[-1].strip()}"


STYLE = """body{font:15px/1.5 system-ui,sans-serif;max-width:62rem;margin:2rem auto;padding:0 1rem;color:#1d2129}
table{border-collapse:collapse;width:100%;font-size:14px}td,th{padding:.4rem .6rem;border-bottom:1px solid #dde1e6;
text-align:left;vertical-align:top}th{color:#5a6270;font-weight:600}img{max-width:100%;margin:1rem 0}
.verdict{font-weight:700}pre{background:#f6f7f9;padding:.7rem;overflow-x:auto;font-size:12px}ul{color:#5a6270}"""


def _html(run: Run, rows: list[Row], plots: dict[str, Path]) -> str:
    def coloured(text: str) -> str:
        return f'<span class="verdict" style="color:{COLOURS[text]}">{text}</span>' if text in COLOURS else text

    body = "".join(
        "<tr>" + "".join(f"<td>{coloured(html.escape(cell))}</td>" for cell in _cells(row)) + "</tr>" for row in rows
    )
    images = "".join(
        f'<img alt="{name}" src="data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}">'
        for name, path in plots.items()
    )
    reasons = "".join(
        f"<h3>{coloured(row.verdict)} {row.project}</h3><pre>{html.escape(row.reason)}</pre>" for row in rows
    )
    facts = "".join(f"<li>{html.escape(fact)}</li>" for fact in _facts(run))
    head = "".join(f"<th>{name}</th>" for name in HEADER)
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>Speed: {run.verdict}</title>'
        f"<style>{STYLE}</style><h1>Speed of a training step: {coloured(run.verdict)}</h1><ul>{facts}</ul>"
        f"<table><tr>{head}</tr>{body}</table>{images}{reasons}</html>\n"
    )
