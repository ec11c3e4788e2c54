"""Progress bars: of the main rank, and where there is a terminal to draw them on."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from typing import TypeVar

from tqdm import tqdm

from common.distributed import rank

Item = TypeVar("Item")


def has_terminal() -> bool:
    """The launcher writes to a log and to the terminal at once: only it knows that there is a terminal behind it."""
    return sys.stderr.isatty() or os.environ.get("PROGRESS_BAR") == "1"


def bar(items: Iterable[Item], what: str, unit: str = "batch") -> Iterable[Item]:
    """`items`, with a bar that is gone when they are."""
    return tqdm(items, desc=what, unit=unit, leave=False, disable=not (has_terminal() and rank() == 0))
