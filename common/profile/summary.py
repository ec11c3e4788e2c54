"""One page on a few recorded steps: operators by time of their own, waits of the host, data and memory."""

from __future__ import annotations

import csv
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

ROWS = 15
# What makes the host wait for the device: reading a value (.item(), float(), if tensor), shapes that depend on data
# (boolean index, nonzero), copies to the host, and explicit synchronisation.
_SYNCS = re.compile(
    r"aten::(_local_scalar_dense|nonzero|masked_select|_unique2?|unique_dim|unique_consecutive)"
    r"|Memcpy DtoH.*|cuda(Stream|Device|Event)Synchronize|aclrtSynchronize\w*"
)


@dataclass
class Window:
    """What was measured around the recorded steps."""

    seconds: float = 0.0
    steps: int = 0
    data_seconds: float = 0.0
    pauses: dict[str, float] = field(default_factory=dict)
    peak_memory: int = 0  # bytes, of the whole run so far


@dataclass(frozen=True)
class Cost:
    """One operator over all recorded steps."""

    name: str
    calls: int
    host_ms: float  # without the operators it calls
    device_ms: float  # likewise; 0 on a CPU
    allocated: int  # bytes that it newly needed, host and device together; may be negative
    in_loader: int = 0  # calls by a data loader of this process, which wait for no device


def from_torch(session: torch.profiler.profile, device: torch.device) -> list[Cost]:
    """Costs of a session of torch.profiler that has been stopped."""
    in_loader = Counter(e.name for e in session.events() if _SYNCS.fullmatch(e.name) and _is_of_loader(e))
    return [
        Cost(
            event.key,
            event.count,
            event.self_cpu_time_total / 1000,
            event.self_device_time_total / 1000 if device.type != "cpu" else 0.0,
            event.self_cpu_memory_usage + event.self_device_memory_usage,
            in_loader[event.key],
        )
        for event in session.key_averages()
        if event.key != "[memory]"  # frees that belong to no operator
    ]


def _is_of_loader(event: Any) -> bool:
    while (event := event.cpu_parent) is not None:
        if event.name.startswith("enumerate(DataLoader)"):
            return True
    return False


def from_torch_npu(folder: Path) -> tuple[Path, list[Cost]]:
    """The folder that torch_npu's profiler wrote last, and the costs in its operator_details.csv.

    Column names as in torch_npu 2.13 (profiler/analysis/prof_view/_operator_view_parser.py); a row is one call. Without
    the file, which its analysis makes, there are no costs.
    """
    written = sorted(folder.glob("*_ascend_pt"), key=lambda path: path.stat().st_mtime)
    if not written:
        return folder, []
    path = written[-1] / "ASCEND_PROFILER_OUTPUT" / "operator_details.csv"
    if not path.is_file():
        return written[-1], []
    sums: dict[str, list[float]] = {}
    with open(path, newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            entry = sums.setdefault(row["Name"], [0, 0.0, 0.0])
            entry[0] += 1
            entry[1] += float(row["Host Self Duration(us)"] or 0) / 1000
            entry[2] += float(row["Device Self Duration(us)"] or 0) / 1000
    return written[-1], [Cost(name, int(calls), host, dev, 0) for name, (calls, host, dev) in sums.items()]


def host_syncs(costs: Iterable[Cost]) -> list[Cost]:
    """The operators that make the host wait, most frequent first, without the calls of the data loader."""
    waiting = [replace(cost, calls=cost.calls - cost.in_loader) for cost in costs if _SYNCS.fullmatch(cost.name)]
    return sorted((cost for cost in waiting if cost.calls), key=lambda cost: -cost.calls)


def summary(headline: str, window: Window, costs: list[Cost], trace: Path) -> str:
    """The page.

    Args:
        headline: what was recorded.
        window: measured times.
        costs: of all operators; empty where the profiler left none.
        trace: where the trace is.
    """
    steps = window.steps
    per_step = 1000 * (window.seconds - sum(window.pauses.values())) / steps
    data = 1000 * window.data_seconds / steps
    lines = [headline, ""]
    lines.append(f"time a step     {per_step:10.2f} ms, with the profiler's own cost")
    lines.append(f"wait for data   {data:10.2f} ms a step, {100 * data / per_step if per_step else 0:.1f} %")
    for name, seconds in window.pauses.items():
        lines.append(
            f"pause           {1000 * seconds:10.2f} ms in all: {name} (in the tables, not in the time a step)"
        )
    lines.append(f"peak memory     {window.peak_memory / 2**20:10.1f} MiB since the start")
    syncs = host_syncs(costs)
    counts = ", ".join(f"{cost.name} {_each(cost.calls, steps)}" for cost in syncs)
    each = _each(sum(cost.calls for cost in syncs), steps)
    lines.append(f"host syncs      {each:>10} a step" + f": {counts} (reads of tensors on the host, too)" * bool(syncs))
    if not costs:
        lines += ["", f"The profiler left no list of operators in {trace}: see its own messages above."]
    else:
        lines += ["", *_time_table(costs, steps), "", *_memory_table(costs, steps)]
    lines += ["", f"trace: {trace} (https://ui.perfetto.dev opens it; a folder of torch_npu: MindStudio Insight)"]
    return "\n".join(lines) + "\n"


def _time_table(costs: list[Cost], steps: int) -> list[str]:
    """Operators by time of their own: on the device where it was seen, else on the host."""
    on_device = any(cost.device_ms for cost in costs)
    total = sum(cost.device_ms if on_device else cost.host_ms for cost in costs) or 1.0
    ranked = sorted(costs, key=lambda cost: -(cost.device_ms if on_device else cost.host_ms))[:ROWS]
    where = "device" if on_device else "host"
    lines = [f"operators by {where} time of their own", "   ms a step      %  calls a step  operator"]
    for cost in ranked:
        value = cost.device_ms if on_device else cost.host_ms
        calls = _each(cost.calls, steps)
        lines.append(f"{value / steps:12.3f} {100 * value / total:6.1f} {calls:>13}  {cost.name[:70]}")
    return lines


def _memory_table(costs: list[Cost], steps: int) -> list[str]:
    ranked = [cost for cost in sorted(costs, key=lambda cost: -cost.allocated)[:5] if cost.allocated > 0]
    lines = ["operators by memory they newly need", "  MiB a step  operator"] if ranked else []
    return lines + [f"{cost.allocated / steps / 2**20:12.3f}  {cost.name[:70]}" for cost in ranked]


def _each(count: int, steps: int) -> str:
    """A count a step, whole where it is."""
    return f"{count / steps:.1f}".removesuffix(".0")
