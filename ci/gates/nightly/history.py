"""Speeds by night as a picture."""

from __future__ import annotations

from pathlib import Path

from common.run import figures

KEPT_RUNS = 60  # in the plot


def plot_history(history: list[dict], path: Path, unit: str) -> Path:
    """Speeds over the runs on one machine, a panel a case, oldest first.

    Args:
        history: {"project", "size", "precision", "commit", "speed", "machine"} of every run.
        unit: of the speeds, in words.
    """
    cases = list(dict.fromkeys((line["project"], line["size"], line["precision"]) for line in history))
    columns = min(2, len(cases))
    lines_of_panels = -(-len(cases) // columns)
    size = (4.4 * columns, 0.5 + 2.3 * lines_of_panels)
    figure, grid = figures.new(size, lines_of_panels, columns, squeeze=False)
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
    figures.save(figure, path)
    return path
