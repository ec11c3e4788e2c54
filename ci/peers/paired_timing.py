"""Shared by the peer benchmarks: paired CPU-second timing, the machine's matmul peak, and the JSON of a result.

CPU seconds of this process at one thread, not wall time, and A and B by turns: what else runs on the machine then
disturbs both alike.
"""

import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

BASELINES = Path(__file__).resolve().parents[1] / "baselines" / "cpu"


@dataclass(frozen=True)
class Ratio:
    """b over a (above 1: a is faster): median, smallest and largest of the rounds; and the median seconds of each."""

    median: float
    low: float
    high: float
    a_seconds: float
    b_seconds: float


def cpu_seconds(work: Callable[[], Any]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def paired(a: Callable[[], Any], b: Callable[[], Any], rounds: int = 7, warmup: int = 1) -> Ratio:
    """Runs a and b by turns, whoever begins changing each round."""
    for _ in range(warmup):
        a(), b()
    pairs = []
    for index in range(rounds):
        if index % 2 == 0:
            seconds_a = cpu_seconds(a)
            seconds_b = cpu_seconds(b)
        else:
            seconds_b = cpu_seconds(b)
            seconds_a = cpu_seconds(a)
        pairs.append((seconds_a, seconds_b))
    ratios = [seconds_b / seconds_a for seconds_a, seconds_b in pairs]
    medians = [statistics.median(column) for column in zip(*pairs, strict=True)]
    return Ratio(statistics.median(ratios), min(ratios), max(ratios), *medians)


def gemm_peak(dtype: torch.dtype, seconds: float = 2.0) -> float:
    """The best rate of `torch.mm` seen on square matrices, in FLOP per CPU second, at the current thread count."""
    best, spent = 0.0, 0.0
    while spent < seconds:
        for size in (1024, 2048):
            left, right = torch.randn(size, size).to(dtype), torch.randn(size, size).to(dtype)
            taken = cpu_seconds(lambda left=left, right=right: torch.mm(left, right))
            best, spent = max(best, 2 * size**3 / taken), spent + taken
    return best


def write_result(name: str, result: dict[str, Any]) -> Path:
    """Writes <name>.json with the machine and the torch version beside the numbers, and prints it.

    Into ci/baselines/cpu, or where $PEERS_OUTPUT_DIR says (`python -m ci.peers --quick` sets it).
    """
    folder = Path(os.environ.get("PEERS_OUTPUT_DIR", BASELINES))
    folder.mkdir(parents=True, exist_ok=True)
    cpu = torch.cpu.get_capabilities().get("cpu_name", platform.processor())
    text = json.dumps({"cpu": cpu, "torch": torch.__version__, "threads": torch.get_num_threads(), **result}, indent=1)
    path = folder / f"{name}.json"
    path.write_text(text + "\n")
    print(text)
    return path
