"""What the long run found: a table, a figure and results.json."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from common.run import figures

Found = Mapping[str, Mapping[int, float]]  # {method: {share of the labels: top-1}}, percent
LABELS_OF_GOAL, LABELS_OF_SCRATCH = 10, 50


def table(found: Found) -> str:
    """Markdown: a row a method, a column a share of the labels."""
    shares = _shares(found)
    head = " | ".join(f"{share} % of the labels" for share in shares)
    lines = [f"| top-1 of the held-out pictures, % | {head} |", "|---|" + "---:|" * len(shares)]
    for method, row in found.items():
        cells = " | ".join(f"{row[share]:.1f}" if share in row else "" for share in shares)
        lines.append(f"| {method} | {cells} |")
    return "\n".join(lines)


def _shares(found: Found) -> list[int]:
    return sorted({share for row in found.values() for share in row})


def goal(found: Found) -> str:
    """Whether a tenth of the labels with pretraining reaches what half of them give without."""
    needed = found["the same from scratch"][LABELS_OF_SCRATCH]
    reached = {method: found[method][LABELS_OF_GOAL] for method in ("BEiT v2", "data2vec")}
    best = max(reached, key=reached.__getitem__)
    verdict = "reached" if reached[best] >= needed else "NOT reached"
    return (
        f"goal, {LABELS_OF_GOAL} % of the labels after pretraining as good as {LABELS_OF_SCRATCH} % without: {verdict} "
        f"({best} {reached[best]:.1f}, from scratch {needed:.1f})"
    )


def seconds_table(output: Path) -> str:
    """Markdown: every stage's seconds."""
    records = {path.parent: json.loads(path.read_text(encoding="utf-8")) for path in output.glob("*/*/stage.json")}
    rows = [f"| {folder.relative_to(output)} | {record['seconds']:.0f} |" for folder, record in sorted(records.items())]
    return "\n".join(["| stage | seconds |", "|---|---:|", *rows])


def draw(found: Found, path: Path) -> None:
    """Top-1 over the share of the labels, a line a method."""
    figure, axes = figures.new((7, 4.5))
    for method, row in found.items():
        style = "--" if "scratch" in method or "pixels" in method or method == "guessing" else "-"
        axes.plot(list(row), list(row.values()), style, marker="o", label=method)
    axes.set(xscale="log", xlabel="share of the labels, %", ylabel="top-1 of the held-out pictures, %")
    axes.set_xticks(_shares(found), [str(share) for share in _shares(found)])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=3)
    figures.save(figure, path)
