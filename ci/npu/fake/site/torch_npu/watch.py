"""Says where and in which optimizer step the program did what costs time, or fails, on a card (csrc/observe.h).

With FAKE_NPU_REPORT=FOLDER each process writes FOLDER/<pid>.json, anew after each optimizer step and when it ends:

    {"rank": 0, "program": "run_vit.py", "steps": 8, "operators": 4711,
     "events": [{"step": 3, "kind": "host_wait", "operator": "aten::_local_scalar_dense",
                 "place": "common/run_log.py:267 means", "count": 1}, ...]}

`step` counts from 1: everything up to the first optimizer step, that step included, is 1.
"""

from __future__ import annotations

import atexit
import json
import os
import sys
from collections import Counter
from pathlib import Path

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

ROOT = Path(__file__).resolve().parents[5]
_OWN = str(Path(__file__).resolve().parent)

_events: Counter[tuple[int, str, str, str]] = Counter()
_steps = 0


def start(native) -> None:
    """Begins to count, if a report was asked for."""
    folder = os.environ.get("FAKE_NPU_REPORT")
    if not folder:
        return
    native.observe(note)
    folder_path = Path(folder)

    def step_done(*_) -> None:
        global _steps
        _steps += 1
        _write(native, folder_path)  # forked ranks end without atexit

    def process_ends(pid: int) -> None:
        native.observe(None)
        if os.getpid() == pid:
            _write(native, folder_path)

    register_optimizer_step_post_hook(step_done)
    atexit.register(process_ends, os.getpid())


def note(kind: str, operator: str) -> None:
    """Counts one event, in the step that is under way."""
    _events[_steps + 1, kind, operator, _place()] += 1


def restart() -> None:
    """Forgets all, for another run in this process."""
    global _steps
    _steps = 0
    _events.clear()


def rows() -> list[dict]:
    """The events so far, as in the report."""
    return [
        {"step": step, "kind": kind, "operator": operator, "place": place, "count": count}
        for (step, kind, operator, place), count in sorted(_events.items())
    ]


def _place() -> str:
    """The innermost line of this repository that led here, and of a library it called; else "backward"."""
    library = None
    frame = sys._getframe()
    while frame is not None:
        name = frame.f_code.co_filename
        where = f"{name}:{frame.f_lineno} {frame.f_code.co_name}"
        if name.startswith(str(ROOT)) and "/.venv/" not in name and not name.startswith(_OWN):
            return where.removeprefix(f"{ROOT}/") + (f" in {library}" if library else "")
        if library is None and "/torch/" not in name and not name.startswith(("<", _OWN)):
            library = where.rpartition("site-packages/")[2]
        frame = frame.f_back
    return library or "backward"


def _write(native, folder: Path) -> None:
    report = {
        "rank": int(os.environ.get("RANK", 0)),
        "program": Path(sys.argv[0]).name if sys.argv else "",
        "steps": _steps,
        "operators": native.operators_run(),
        "peak_bytes": torch.npu.max_memory_allocated(),
        "events": rows(),
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{os.getpid()}.json").write_text(json.dumps(report, indent=1) + "\n")
