"""A simulated `npu` device for tests: see README.md. This module is for the process that starts programs on it."""

from __future__ import annotations

import importlib.util
import json
import os
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

SITE = Path(__file__).resolve().parent / "site"
KINDS = ("host_wait", "dynamic_shape", "float64", "undocumented_type")


def builder() -> ModuleType:
    """The module that compiles the device, without making this process one that has it."""
    spec = importlib.util.spec_from_file_location("fake_npu_build", SITE / "torch_npu" / "build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def why_missing() -> str | None:
    """Why the device cannot be had here, or None. A compiler, or a build of an earlier run, is all it takes."""
    build = builder()
    if build.compiler() or build.library().is_file():
        return None
    return "the simulated npu device needs a C++ compiler (c++, or CXX=...)"


def environment(report: Path | None = None, devices: int = 2, **more: str) -> dict[str, str]:
    """The variables that give a process, and all it starts, `devices` simulated cards. Builds the device if needed.

    Args:
        report: folder for the processes' reports, see `read_reports`.
        **more: further variables.
    """
    builder().build()
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("RANK", "ASCEND", "HCCL_"))}
    paths = [str(SITE), *filter(None, [os.environ.get("PYTHONPATH")])]
    chosen = {"PYTHONPATH": os.pathsep.join(paths), "FAKE_NPU_DEVICES": str(devices)}
    if report is not None:
        chosen["FAKE_NPU_REPORT"] = str(report)
    return {**clean, "OMP_NUM_THREADS": "1", "etp_running_flag": "true", **chosen, **more}


@dataclass(frozen=True)
class Event:
    """What a card would have waited or compiled for; see csrc/observe.h for the kinds."""

    step: int
    kind: str
    operator: str
    place: str
    count: int

    def __str__(self) -> str:
        return f"step {self.step}: {self.kind} {self.operator} at {self.place} ({self.count} times)"


@dataclass(frozen=True)
class Report:
    """What one training process did. `steps` counts optimizer steps; step 1 is all up to the end of the first."""

    rank: int
    program: str
    steps: int
    events: tuple[Event, ...]

    def between(self, first: int, last: int, *kinds: str) -> list[Event]:
        """The events of steps first to last, both included, of the given kinds (default: all)."""
        return [e for e in self.events if first <= e.step <= last and e.kind in (kinds or KINDS)]


def read_reports(folder: Path) -> list[Report]:
    """The reports of the processes that made at least one optimizer step, by rank."""
    reports = []
    for path in folder.glob("*.json"):
        content = json.loads(path.read_text())
        if content["steps"]:
            events = tuple(Event(**event) for event in content["events"])
            reports.append(Report(content["rank"], content["program"], content["steps"], events))
    return sorted(reports, key=lambda report: report.rank)
