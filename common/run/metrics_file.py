"""metrics.jsonl, whole after a crash and continued at a step; the losses' list and plot."""

from __future__ import annotations

import errno
import json
import math
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from common.run import figures


class MetricsFile:
    """A file that lines are appended to. What a crash cut short or glued together is mended when it is opened."""

    def __init__(self, path: Path):
        self.path = path
        lines = list(read_lines(path))
        whole = "".join(json.dumps(line) + "\n" for line in lines)
        if path.exists() and path.read_text(encoding="utf-8", errors="replace") != whole:
            self._replace(whole)
        self._open()

    def write(self, line: dict[str, Any]) -> None:
        """Appends one line. OSError, naming the path, where the disk is full or the folder was deleted."""
        data = memoryview((json.dumps(line) + "\n").encode())
        try:
            while data:
                data = data[self._file.write(data) :]
            if not os.path.samestat(os.fstat(self._file.fileno()), os.stat(self.path)):
                raise FileNotFoundError(errno.ENOENT, "no longer there")
        except FileNotFoundError:
            text = "was deleted or replaced while the run wrote to it"
            raise FileNotFoundError(errno.ENOENT, text, str(self.path)) from None
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.path)) from error

    def continue_at(self, step: int) -> None:
        """Drops the lines of `step` and later ones: the run comes to them again."""
        lines = list(read_lines(self.path))
        kept = [line for line in lines if not (isinstance(line.get("step"), int) and line["step"] >= step)]
        if len(kept) < len(lines):
            self._file.close()
            self._replace("".join(json.dumps(line) + "\n" for line in kept))
            self._open()

    def sync(self) -> None:
        """What was written reaches the disk, which a checkpoint's thread waits for and no step."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()

    def _open(self) -> None:
        self._file = open(self.path, "ab", buffering=0)

    def _replace(self, text: str) -> None:
        temporary = self.path.with_name(f".{self.path.name}.tmp")
        try:
            temporary.write_text(text, encoding="utf-8")
            os.replace(temporary, self.path)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise OSError(error.errno, error.strerror, str(self.path)) from error


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The whole records of a metrics.jsonl; of a line that a crash cut and the next run went on in, the whole part."""
    if not path.exists():
        return
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
        for part in (text, *re.split(r'(?=\{"kind": )', text)[1:]):
            try:
                line = json.loads(part)
            except (ValueError, RecursionError):
                continue
            if isinstance(line, dict):
                yield line
            break


def read_losses(metrics: Path) -> dict[int, float]:
    """Loss by step of a metrics.jsonl; where a run repeats a step, its later line counts; a line without is none."""
    lines = ((line.get("step"), line.get("loss")) for line in read_lines(metrics) if line.get("kind") == "train")
    return {
        step: loss
        for step, loss in lines
        if type(step) is int and isinstance(loss, float | int) and not isinstance(loss, bool)
    }


# what an evaluation is drawn by, the first of them that it has
_SHOWN = ("top1", "acc1", "eval_text_to_image_R@1", "loss", "eval_loss")


def read_evaluations(metrics: Path) -> tuple[str, dict[int, float]]:
    """(name of a number, its values by step) of a metrics.jsonl's evaluations; ("", {}) without any."""
    lines = [line for line in read_lines(metrics) if line.get("kind") in ("eval", "valid")]
    for name in _SHOWN:
        found = {line["step"]: line[name] for line in lines if name in line and type(line.get("step")) is int}
        if found:
            return name, found
    return "", {}


def plot_loss(losses: list[tuple[int, float]], path: Path, title: str, metrics: Path | None = None) -> None:
    """Draws the loss over steps, with a running mean when there are enough points.

    Args:
        metrics: metrics.jsonl, whose evaluations are drawn beside, where there are two or more: a loss on the same
            scale, anything else on one of its own.
    """
    steps = [step for step, _ in losses]
    values = [loss for _, loss in losses]
    figure, axes = figures.new((7, 4))
    axes.plot(
        steps, values, color="tab:blue", alpha=0.4 if len(values) > 20 else 1.0, marker="." if len(values) == 1 else ""
    )
    if len(values) > 20:
        width = max(2, len(values) // 20)
        means = [math.fsum(values[i - width + 1 : i + 1]) / width for i in range(width - 1, len(values))]
        axes.plot(steps[width - 1 :], means, color="tab:blue", label=f"training, mean of {width} lines")
    axes.set(xlabel="step", ylabel="loss", title=title)
    axes.grid(alpha=0.3)
    name, evaluations = read_evaluations(metrics) if metrics is not None else ("", {})
    if len(evaluations) > 1:
        beside = axes if name.endswith("loss") else axes.twinx()
        style = {"color": "tab:orange", "marker": ".", "label": f"evaluation: {name.removeprefix('eval_')}"}
        beside.plot(list(evaluations), list(evaluations.values()), **style)
        if beside is not axes:
            beside.set_ylabel(name.removeprefix("eval_"))
    if any(len(part.get_legend_handles_labels()[0]) for part in figure.axes):
        figure.legend(loc="outside lower center", ncols=2)
    figures.save(figure, path)
