"""An evaluation class by class: counts, the table, the confusion matrix as JSON and as a picture."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.distributed import all_reduce_sum
from common.run.figures import fonts_for, new, save
from vit.training.evaluate import Score

MOST_CLASSES = 4096  # a matrix of more does not fit beside a model
IN_THE_LOG = 20  # classes; of more the worst are shown
NAMED = 40  # classes that still have room for their names beside the picture


@dataclass
class ClassTally:
    """`confusion[t, p]`: pictures of class t that were called p, int64 [C, C]; `top5` [C]: top-5 hits of class t.

    A tie counts against the picture, as in `metrics.topk_correct`: the diagonal adds up to its top-1 hits.
    """

    confusion: Tensor
    top5: Tensor

    @classmethod
    def of(cls, num_classes: int, device: torch.device) -> ClassTally | None:
        """Empty; None for more than MOST_CLASSES."""
        if num_classes > MOST_CLASSES:
            return None
        kind = {"dtype": torch.int64, "device": device}
        return cls(torch.zeros(num_classes, num_classes, **kind), torch.zeros(num_classes, **kind))

    def add(self, logits: Tensor, target: Tensor) -> None:
        """Counts logits [B, C] and class indices [B]."""
        own = logits.gather(1, target.unsqueeze(1))  # [B, 1]
        before = (logits >= own).sum(1) - 1  # [B]
        others = logits.scatter(1, target.unsqueeze(1), -torch.inf)  # [B, C]
        called = torch.where(before == 0, target, others.argmax(1))  # [B]
        classes = len(self.top5)
        cells = torch.bincount(target * classes + called, minlength=classes * classes)
        self.confusion += cells.view(classes, classes)
        self.top5 += torch.bincount(target[before < 5], minlength=classes)

    def reduce(self) -> None:
        """Adds all ranks up."""
        self.confusion, self.top5 = all_reduce_sum(self.confusion), all_reduce_sum(self.top5)

    @property
    def mean_class_accuracy(self) -> float:
        """Percent: the mean over classes that have pictures, each counting the same."""
        pictures = self.confusion.sum(1)
        return round(100 * (self.confusion.diagonal() / pictures)[pictures > 0].mean().item(), 4)


def write(folder: Path, method: str, names: Sequence[str], tally: ClassTally, score: Score) -> str:
    """Writes `evaluation.json` and `confusion.png` (of other methods than eval `<method>...`); returns the table."""
    rows = _rows(names, tally)
    stem, prefix = ("evaluation", "") if method == "eval" else (method, f"{method}_")
    content = {
        **score.metrics,
        "count": score.count,
        "mean_class_accuracy": tally.mean_class_accuracy,
        "classes": rows,
        "confusion": tally.confusion.tolist(),  # rows: what it is; columns: what it was called
    }
    target = folder / f"{stem}.json"
    part = target.with_suffix(".part")
    part.write_text(json.dumps(content, ensure_ascii=False) + "\n", encoding="utf-8")
    part.replace(target)
    _draw(names, tally.confusion, folder / f"{prefix}confusion.png")
    return f"{_table(rows, tally)}\nwritten: {target}, {folder / f'{prefix}confusion.png'}"


def _rows(names: Sequence[str], tally: ClassTally) -> list[dict[str, Any]]:
    """A line of every class that has pictures; percentages, None where nothing was called so."""
    matrix, rows = tally.confusion.cpu(), []
    called, top5 = matrix.sum(0).tolist(), tally.top5.tolist()
    for index, name in enumerate(names):
        counts = matrix[index].clone()
        pictures, hits = int(counts.sum()), int(counts[index])
        if pictures == 0:
            continue
        counts[index] = 0
        most = int(counts.argmax()) if int(counts.max()) else None
        rows.append(
            {
                "class": name,
                "pictures": pictures,
                "top1": round(100 * hits / pictures, 4),
                "top5": round(100 * top5[index] / pictures, 4),
                "precision": round(100 * hits / called[index], 4) if called[index] else None,
                "f1": round(200 * hits / (pictures + called[index]), 4),
                "most_often_taken_for": None if most is None else names[most],
            }
        )
    return rows


def _table(rows: Sequence[dict[str, Any]], tally: ClassTally) -> str:
    shown, title = rows, "by class"
    if len(rows) > IN_THE_LOG:
        shown, title = sorted(rows, key=lambda row: row["f1"])[:IN_THE_LOG], f"the {IN_THE_LOG} of least F1"
    lines = [f"{len(rows)} classes, mean of their accuracies {tally.mean_class_accuracy:.3f} %; {title}, in percent:"]
    lines += [f"{'pictures':>8} {'top-1':>6} {'top-5':>6} {'precis.':>7} {'F1':>6}  class (most often taken for)"]
    for row in shown:
        precision = "-" if row["precision"] is None else f"{row['precision']:.1f}"
        other = f" ({row['most_often_taken_for']})" if row["most_often_taken_for"] else ""
        lines.append(
            f"{row['pictures']:>8} {row['top1']:>6.1f} {row['top5']:>6.1f} {precision:>7} {row['f1']:>6.1f}  "
            f"{row['class']}{other}"
        )
    return "\n".join(lines)


def _draw(names: Sequence[str], matrix: Tensor, target: Path) -> None:
    """Shares of each class's pictures, rows what it is, columns what it was called."""
    with fonts_for(names if len(names) <= NAMED else ()):
        save(_confusion(names, matrix), target)


def _confusion(names: Sequence[str], matrix: Tensor):
    shares = (matrix / matrix.sum(1, keepdim=True).clamp(min=1)).cpu()
    classes = len(names)
    side = min(3 + 0.3 * classes, 14)
    figure, axis = new((side, side))
    image = axis.imshow(shares.numpy(), vmin=0, vmax=1, cmap="viridis", interpolation="nearest")
    figure.colorbar(image, ax=axis, shrink=0.7, label="share of the class's pictures")
    axis.set(xlabel="called", ylabel="is")
    if classes <= NAMED:
        axis.set_xticks(range(classes), names, rotation=90)
        axis.set_yticks(range(classes), names)
        for row in range(classes) if classes <= NAMED // 2 else ():
            for column in range(classes):
                if count := int(matrix[row, column]):
                    colour = "black" if shares[row, column] > 0.6 else "white"
                    axis.text(column, row, count, ha="center", va="center", color=colour, fontsize=7)
    return figure
