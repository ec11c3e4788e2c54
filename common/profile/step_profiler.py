"""`--profile`: a trace of three training steps and one page that says where their time went.

Steps 10 to 12 of the run are recorded on the main rank, after compilation and caches have settled; of a shorter run the
last three steps, but never the first. `<output_dir>/profile/` then has the trace and `summary.txt`. The numbers of the
result file are those of a run that was profiled: measure speed without it.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch

from common import device as devices
from common import npu
from common.distributed import World
from common.profile.summary import Window, from_torch, from_torch_npu, summary

FIRST, LAST = 10, 12
FOLDER = "profile"


class StepProfiler:
    """Records a few steps of a run; every method may be called on all ranks and whether or not anything is recorded.

    Args:
        output_dir: of the run.
        network: the project's name, for the summary's title.
        world: this process and its device.
        total_steps: length of the whole run in steps; None where nobody knows.

    Raises:
        devices.UsageError: a run of a single step, of which nothing could be recorded.
    """

    def __init__(self, output_dir: Path, network: str, world: World, total_steps: int | None):
        if total_steps == 1:
            raise devices.UsageError("--profile: a run of one step has none to record, the first compiles; give more")
        self.output_dir = Path(output_dir)
        self.title = network
        self.world = world
        self.total_steps = total_steps
        self.first, self.last = FIRST, LAST
        self._done = not world.is_main
        self._steps = 0  # of this run: a resumed one begins at 0, too
        self._window: Window | None = None

    def step(self, step: int | None = None) -> str | None:
        """After each step; `step` counts over the whole run. Returns what to tell the user when the page is written."""
        if self._done:
            return None
        self._steps += 1
        if self._steps == 1 and step is not None and self.total_steps is not None:
            self._fit(self.total_steps - step + 1)
        if self._steps == self.last:
            return self.finish()
        if self._window is not None:
            self._session.step()
        if self._steps == self.first - 1:
            self._begin()
        return None

    def data_wait(self, seconds: float) -> None:
        """The wait for a batch, to be told apart in the summary."""
        if self._window is not None:
            self._window.data_seconds += seconds

    def pause(self, name: str, seconds: float) -> None:
        """An evaluation or a checkpoint: its operators are in the trace, its time is told apart."""
        if self._window is not None:
            self._window.pauses[name] = self._window.pauses.get(name, 0.0) + seconds

    def finish(self) -> str | None:
        """Writes trace and summary of what was recorded; the run's end, when it comes before step 12, ends it too."""
        if self._done:
            return None
        self._done = True
        if self._window is None:
            return f"--profile: the run ended after {self._steps} steps, before step {self.first}: nothing was recorded"
        window = self._window
        devices.synchronize(self.world.device)
        window.seconds = time.perf_counter() - self._began
        window.steps = self._steps - self.first + 1
        if self._steps == self.last:
            self._session.step()
        self._session.stop()
        if window.steps < 1:
            return "--profile: no step was recorded"
        window.peak_memory = devices.peak_memory_bytes(self.world.device)
        if isinstance(self._session, torch.profiler.profile):
            trace = self.folder / "trace.json.gz"
            self._session.export_chrome_trace(str(trace))
            costs = from_torch(self._session, self.world.device)
        else:
            trace, costs = from_torch_npu(self.folder)
        text = summary(self._headline(), window, costs, trace)
        path = self.folder / "summary.txt"
        path.write_text(text, encoding="utf-8")
        return f"profile: {path}, {trace.name}"

    def _fit(self, length: int) -> None:
        """A run of fewer than twelve steps: its last three, without the first."""
        if length < LAST:
            self.first, self.last = max(2, length - 2), length
        if length < 2:
            self.first = LAST  # never reached

    def _begin(self) -> None:
        self.folder = _unused(self.output_dir)
        self.folder.mkdir(parents=True)
        steps = self.last - self.first + 1
        npu_session = npu_profiler(self.folder, steps) if npu.is_npu(self.world.device) else None
        self._session = npu_session or torch.profiler.profile(
            activities=_activities(self.world.device), profile_memory=True, acc_events=True
        )
        self._window = Window()
        devices.synchronize(self.world.device)
        self._session.start()
        self._began = time.perf_counter()

    def _headline(self) -> str:
        steps = f"steps {self.first} to {self._steps} of this run"
        return f"{self.title}, {steps}, rank 0 of {self.world.size}, {devices.describe(self.world.device)}"


def _unused(output_dir: Path) -> Path:
    """`profile`, or `profile-2` and so on where a run that this one continues has left one."""
    folder, number = output_dir / FOLDER, 1
    while folder.exists():
        number += 1
        folder = output_dir / f"{FOLDER}-{number}"
    return folder


def _activities(device: torch.device) -> list[torch.profiler.ProfilerActivity]:
    kinds = torch.profiler.ProfilerActivity
    return [kinds.CPU, kinds.CUDA] if device.type == "cuda" else [kinds.CPU]


def npu_profiler(folder: Path, steps: int) -> Any | None:
    """torch_npu's own profiler, which sees the kernels on the card; None where there is none.

    It has `start`, `step` and `stop`, and after so many steps writes a folder `<host>_<pid>_<time>_ascend_pt` into
    `folder`. `torch.profiler` would see the host's side only.
    """
    try:
        import torch_npu
    except ImportError:
        return None
    if not hasattr(torch_npu, "profiler"):
        return None
    # Level1 adds what each kernel took, by kind, to Level0's timeline
    config = torch_npu.profiler._ExperimentalConfig(profiler_level=torch_npu.profiler.ProfilerLevel.Level1)
    return torch_npu.profiler.profile(
        schedule=torch_npu.profiler.schedule(wait=0, active=steps, repeat=1),
        on_trace_ready=torch_npu.profiler.tensorboard_trace_handler(str(folder)),
        profile_memory=True,
        experimental_config=config,
    )
