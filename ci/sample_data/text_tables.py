"""Texts with labels as tables for fine-tuning, and splits that move nothing when texts are added."""

from __future__ import annotations

import csv
import hashlib
from collections.abc import Iterable
from pathlib import Path

VALID_SHARE = TEST_SHARE = 0.1


def write_table(path: Path, rows: Iterable[tuple[str, str]]) -> None:
    """Writes a .csv of the columns `sentence` and `label`."""
    with path.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["sentence", "label"])
        writer.writerows(rows)


def split_of(key: str) -> str:
    """train, valid or test, by the hash of what must stay together."""
    share = int(_hash(key)[:8], 16) / 2**32
    return "test" if share < TEST_SHARE else "valid" if share < TEST_SHARE + VALID_SHARE else "train"


def by_hash(names: Iterable[str]) -> list[str]:
    """In an order that says nothing."""
    return sorted(names, key=_hash)


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
