"""Texts with labels as tables for fine-tuning, and splits that move nothing when texts are added."""

from __future__ import annotations

import csv
from collections.abc import Iterable
from pathlib import Path

from ci.sample_data.icon_table import share_of

HELD_OUT = 0.1  # for validation, and as much for the test


def write_table(path: Path, rows: Iterable[tuple[str, str]]) -> None:
    """Writes a .csv of the columns `sentence` and `label`."""
    with path.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["sentence", "label"])
        writer.writerows(rows)


def split_of(key: str) -> str:
    """train, valid or test, by the hash of what must stay together."""
    share = share_of(key)
    return "test" if share < HELD_OUT else "valid" if share < 2 * HELD_OUT else "train"
