"""Losses by step from the logs of a training run: ours, fairseq's, the epoch lines of log.txt, transformers', CSV.

run/                   a run's folder: its metrics.jsonl, else trainer_state.json, else log.txt
metrics.jsonl          {"kind": "train", "step": 10, "loss": 2.3, "grad_norm": ...}
*.log, *.txt, *.json   fairseq's lines, `[...][train_inner][INFO] - {"loss": "2.3", "num_updates": "10", ...}`, bare or
                       with their prefix; BEiT's log.txt, {"train_loss": 2.3, "epoch": 0, ...}
trainer_state.json     transformers': {"log_history": [{"step": 10, "loss": 2.3}, ...]}
*.csv                  a header with step (or iteration, epoch, num_updates) and loss (or value); a published curve
"""

from __future__ import annotations

import csv
import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.errors import UsageError

IN_FOLDER = ("metrics.jsonl", "trainer_state.json", "log.txt")
STEP_NAMES = ("step", "num_updates", "iteration", "iter", "update", "epoch")
LOSS_NAMES = ("loss", "train_loss", "train/loss", "value")
# what is compared beside the loss where a log has it
OTHER_VALUES = {"grad_norm": ("grad_norm", "gnorm", "train_grad_norm"), "lr": ("lr", "learning_rate", "train_lr")}


@dataclass(frozen=True)
class Curve:
    """One run's values by step.

    Attributes:
        losses: by step, or by epoch where `unit` says so; each the mean since the line before.
        others: likewise of "grad_norm" and "lr", as far as the log has them.
    """

    name: str
    losses: dict[int, float]
    others: dict[str, dict[int, float]]
    unit: str = "step"

    @property
    def spacing(self) -> int:
        """Steps between two lines, the commonest."""
        steps = sorted(self.losses)
        gaps = [b - a for a, b in zip(steps, steps[1:], strict=False)]
        return max(set(gaps), key=gaps.count) if gaps else 1


def read(path: str | Path, name: str | None = None) -> Curve:
    """The curve of a log or of a run's folder.

    Raises:
        UsageError: no such file, no known form, or no losses in it.
    """
    path = Path(path)
    if path.is_dir():
        found = [path / file for file in IN_FOLDER if (path / file).is_file()]
        if not found:
            raise UsageError(f"{path}: no {', '.join(IN_FOLDER)} in this folder")
        return read(found[0], name or path.name)
    if not path.is_file():
        raise UsageError(f"{path}: no such file or folder")
    try:
        text = path.read_text(encoding="utf-8-sig")  # spreadsheets write a byte order mark
    except UnicodeDecodeError:
        raise UsageError(f"{path}: not a text file") from None
    lines = _csv_lines(text) if path.suffix == ".csv" else _state_lines(text) or _json_lines(text)
    curve = _curve(name or path.stem, lines)
    if not curve.losses:
        raise UsageError(f"{path}: no losses in it; known are {', '.join(IN_FOLDER)}, fairseq's JSON lines and CSV")
    return curve


def _csv_lines(text: str) -> list[dict[str, Any]]:
    rows = csv.DictReader(text.splitlines())
    return [{(key or "").strip().lower(): value for key, value in row.items()} for row in rows]


def _state_lines(text: str) -> list[dict[str, Any]]:
    """The history of a trainer_state.json; none for anything else."""
    try:
        state = json.loads(text)
    except json.JSONDecodeError:
        return []
    history = state.get("log_history", []) if isinstance(state, dict) else []
    return [line for line in history if "loss" in line]  # the last line has the whole run's mean, as train_loss


def _json_lines(text: str) -> list[dict[str, Any]]:
    """The JSON objects of a log, each alone on its line or after fairseq's prefix; other lines are passed over.

    Of fairseq's tags only the training's own lines within an epoch count.
    """
    lines = []
    for line in text.splitlines():
        found = re.match(r"(?:\[.*?\]\[(?P<tag>\w+)\]\[INFO\] - )?(?P<body>\{.*\})\s*$", line.strip())
        if not found or found["tag"] not in (None, "train_inner"):
            continue
        try:
            values = json.loads(found["body"])
        except json.JSONDecodeError:  # cut short by a crash
            continue
        if values.get("kind", "train") == "train":
            lines.append(values)
    return lines


def _curve(name: str, lines: list[dict[str, Any]]) -> Curve:
    curve = Curve(name, {}, {key: {} for key in OTHER_VALUES}, "step")
    unit = "step"
    for line in lines:
        loss, step_name = _number(line, LOSS_NAMES), next((n for n in STEP_NAMES if n in line), None)
        step = _number(line, STEP_NAMES)
        if loss is None or step is None or not step.is_integer():
            continue
        unit = "epoch" if step_name == "epoch" else "step"
        curve.losses[int(step)] = loss  # a resumed run's later line counts
        for key, names in OTHER_VALUES.items():
            value = _number(line, names)
            if value is not None:
                curve.others[key][int(step)] = value
    return Curve(name, dict(sorted(curve.losses.items())), {k: v for k, v in curve.others.items() if v}, unit)


def _number(line: dict[str, Any], names: tuple[str, ...]) -> float | None:
    for name in names:
        if name in line and line[name] not in (None, ""):
            try:
                return float(line[name])
            except (TypeError, ValueError):
                return None
    return None


def on_common_steps(a: Curve, b: Curve) -> tuple[list[int], list[float], list[float]]:
    """(steps, losses of A, losses of B) where both have a line.

    A line is the mean since the line before. Where one log is finer, its lines are averaged over the other's window.
    """
    fine, coarse = (a, b) if a.spacing < b.spacing else (b, a)
    resampled = fine.losses
    if fine.spacing < coarse.spacing:
        resampled = {}
        for step in coarse.losses:
            window = [loss for s, loss in fine.losses.items() if step - coarse.spacing < s <= step]
            if len(window) == coarse.spacing // fine.spacing:
                resampled[step] = math.fsum(window) / len(window)
    steps = sorted(set(coarse.losses) & set(resampled))
    values = {id(coarse): coarse.losses, id(fine): resampled}
    return steps, [values[id(a)][s] for s in steps], [values[id(b)][s] for s in steps]
