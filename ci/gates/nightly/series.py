"""Speeds of earlier nights on one device, and whether tonight's is below them.

ci/baselines/<device>/<case>.json holds series, one for each combination of what a speed depends on: device, driver,
CANN, torch, batch, precision, ranks, settings. A new driver begins a new series instead of raising an alarm.
"""

from __future__ import annotations

import json
import os
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SLOWER, FASTER, SAME, NEW = "SLOWER", "FASTER", "OK", "NEW"
FEWEST_NIGHTS, LAST_NIGHTS, KEPT_NIGHTS = 3, 10, 400
SMALLEST_ALARM = 0.05  # of the median
MAD_TO_DEVIATION = 1.4826  # of a normal distribution


@dataclass(frozen=True)
class Judgement:
    """`median` of the last nights, and the share of it that a night may fall; None for a new series."""

    verdict: str
    nights: int
    median: float | None = None
    allowed: float | None = None


def nights_of(path: Path, key: dict[str, Any]) -> list[dict[str, Any]]:
    """The nights of a series, oldest first; none where there is no such file or series."""
    series = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    return next((entry["nights"] for entry in series if entry["key"] == key), [])


def add_night(path: Path, key: dict[str, Any], night: dict[str, Any]) -> None:
    """Adds a night ({"date", "commit", "fps", ...}) to its series, which is made where it does not exist."""
    series = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    entry = next((entry for entry in series if entry["key"] == key), None)
    if entry is None:
        entry = {"key": key, "nights": []}
        series.append(entry)
    entry["nights"] = [*entry["nights"], night][-KEPT_NIGHTS:]
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(series, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def judge(fps: float, nights: list[dict[str, Any]]) -> Judgement:
    """Tonight against the median of the last nights.

    The alarm is at three robust deviations (1.48 x the median absolute deviation), and at 5 % at least; a smaller loss
    is for `make perf` to find.
    """
    speeds = [night["fps"] for night in nights[-LAST_NIGHTS:]]
    if len(speeds) < FEWEST_NIGHTS:
        return Judgement(NEW, len(speeds))
    median = statistics.median(speeds)
    deviation = MAD_TO_DEVIATION * statistics.median(abs(speed - median) for speed in speeds)
    allowed = max(3 * deviation / median, SMALLEST_ALARM)
    verdict = SLOWER if fps < median * (1 - allowed) else FASTER if fps > median * (1 + allowed) else SAME
    return Judgement(verdict, len(speeds), median, allowed)
