"""The end of a demo: its numbers beside what needs no learning, in a table, in demo.json and as an exit code.

lines = [Line("top1", "top-1, held-out emoji", 66.2, {"guessing": 18.0, "nearest pixels": 60.2})]
sys.exit(conclude(lines, Path(output) / "demo.json", promises(config), cpu_seconds))
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

# "# Promises: top1 >= 64 within 480 CPU seconds", in the head of a config or script
_PROMISE = re.compile(r"^# Promises: (.+) within (\d+) CPU seconds", re.MULTILINE)


@dataclass(frozen=True)
class Line:
    """One number of a demo, in percent or percentage points.

    Attributes:
        metric: key in demo.json.
        label: what it is, for people.
        value: what was learned.
        beside: {method: its number on the same split}: guessing, methods without learning, controls.
        binding: whether the demo fails when it does not beat all of them; otherwise the line is shown only.
    """

    metric: str
    label: str
    value: float
    beside: Mapping[str, float]
    binding: bool = True

    @property
    def yardstick(self) -> float:
        """The best of what it is held against."""
        return max(self.beside.values())

    @property
    def passed(self) -> bool:
        return self.value > self.yardstick  # False for nan


@dataclass(frozen=True)
class Promise:
    """What the head of a demo's config says: a value for each metric, and the CPU seconds they take."""

    least: Mapping[str, float]
    cpu_seconds: float


def promises(path: Path) -> Promise:
    """Reads the line "# Promises: METRIC >= VALUE[, ...] within N CPU seconds" of a file.

    ValueError where it has none.
    """
    found = _PROMISE.search(path.read_text(encoding="utf-8"))
    if not found:
        raise ValueError(f"{path}: no line '# Promises: METRIC >= VALUE within N CPU seconds'")
    pairs = (part.split(">=") for part in found[1].split(","))
    return Promise({name.strip(): float(value) for name, value in pairs}, float(found[2]))


def conclude(lines: Sequence[Line], path: Path, promise: Promise, cpu_seconds: float, **more: object) -> int:
    """Prints the table and whether the promise was kept, writes everything to `path` (demo.json).

    Args:
        cpu_seconds: that the demo took so far.
        more: further keys of demo.json; of `cpu_seconds_to`, {threshold: seconds or None}, it prints the lines too.

    Returns:
        The exit code: 1 when a binding line is not above everything beside it. A promise not kept is only said: on
        another machine, or with another seed, the numbers differ a little.
    """
    print(table(lines))
    values = {line.metric: line.value for line in lines}
    kept = {f"{name} >= {least:g}": values[name] >= least for name, least in promise.least.items()}
    kept[f"{promise.cpu_seconds:g} CPU seconds"] = cpu_seconds <= promise.cpu_seconds
    for what, is_kept in kept.items():
        print(f"promise {what}: {'kept' if is_kept else 'NOT KEPT'}")
    print(f"CPU seconds: {cpu_seconds:.0f}")
    for what, spent in (more.get("cpu_seconds_to") or {}).items():
        print(f"CPU seconds of training until {what}: {'not reached' if spent is None else format(spent, '.0f')}")
    content = {
        **values,
        "beside": {line.metric: dict(line.beside) for line in lines},
        "cpu_seconds": round(cpu_seconds, 1),
        "promises_kept": kept,
        **more,
    }
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    failed = [line for line in lines if line.binding and not line.passed]
    for line in failed:
        print(
            f"error: {line.label}: {line.value:.1f} does not beat {line.yardstick:.1f}, which needs no learning of it"
        )
    return 1 if failed else 0


def table(lines: Sequence[Line]) -> str:
    """Markdown: a row a number, a column for everything it is shown beside; * marks rows that are shown only."""
    methods = list(dict.fromkeys(method for line in lines for method in line.beside))
    head = ["", "learned", *methods]
    rows = [
        [
            line.label + ("" if line.binding else " *"),
            f"{line.value:.1f}",
            *(f"{line.beside[m]:.1f}" if m in line.beside else "" for m in methods),
        ]
        for line in lines
    ]
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    cells = [
        [row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))]
        for row in [head, *rows]
    ]
    cells.insert(1, ["-" * widths[0], *("-" * (w - 1) + ":" for w in widths[1:])])
    return "\n".join("| " + " | ".join(row) + " |" for row in cells)


def cpu_seconds_of(times_file: Path) -> float:
    """The sum of what bash's `times` wrote: of the shell and of all its children that have ended."""
    return sum(60 * int(m) + float(s) for m, s in re.findall(r"(\d+)m([\d.]+)s", times_file.read_text()))


def cpu_seconds_to(evaluations: Sequence[Mapping[str, float]], metric: str, least: float) -> float | None:
    """CPU seconds of training at the first evaluation whose `metric` is above `least`; None where none is.

    `evaluations` are the "eval" records of metrics.jsonl, with `cpu_s`.
    """
    return next((record["cpu_s"] for record in evaluations if record[metric] > least), None)


def read_evaluations(metrics_file: Path) -> list[dict]:
    """The "eval" records of a run's metrics.jsonl."""
    records = map(json.loads, metrics_file.read_text(encoding="utf-8").splitlines())
    return [record for record in records if record["kind"] == "eval"]
