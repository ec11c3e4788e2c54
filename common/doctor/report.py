"""A line of the doctor's report, and what several checks need."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

GOOD, NOTE, WRONG = "good", "note", "wrong"


@dataclass(frozen=True)
class Line:
    """One line of the report."""

    verdict: str
    text: str
    remedy: str = ""

    def __str__(self) -> str:
        arrow = f"\n         -> {self.remedy}" if self.remedy else ""
        return f"  {self.verdict:<6} {self.text}{arrow}"


def release(version: str) -> tuple[int, ...]:
    """(8, 3) of "8.3.RC1": the leading numbers."""
    numbers = re.match(r"\d+(?:\.\d+)*", version)
    return tuple(int(number) for number in numbers.group().split(".")) if numbers else ()


def install_torch(wanted: dict[str, Any], device: str = "auto") -> str:
    """On Linux PyPI's build comes with gigabytes of CUDA, so that other devices take the small one."""
    index = "" if device in ("auto", "cuda") else " --index-url https://download.pytorch.org/whl/cpu"
    return f"pip install torch=={wanted['torch']} torchvision=={wanted['torchvision']}{index}"
