"""Loss and FPS of a run: console line, metrics.jsonl, TensorBoard, loss plot and the ModelZoo result file.

FPS is defined in run/throughput.py; the wait for data, which it includes, is also reported apart as `data_ms`, the mean
wait a step in milliseconds. All numbers in the result file are measured here; nothing is fished out of printed text.
"""

from __future__ import annotations

import contextlib
import json
import math
import sys
import time
from collections.abc import Iterator
from datetime import timedelta
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from common import device as devices
from common.checkpoint.background_write import BackgroundWriter
from common.distributed import World
from common.errors import Preempted, UsageError, name_place
from common.profile.precision_dump import PrecisionDump
from common.profile.step_profiler import StepProfiler
from common.run import boards, folder_lock, progress, run_folder, utilisation
from common.run.metrics_file import MetricsFile, plot_loss, read_losses
from common.run.preemption import Watch
from common.run.result_file import ResultFile, keep_aside
from common.run.throughput import Scalar, SteadyClock, Window


class RunLog:
    """The log of one training run, used as a context manager around the loop.

    While the block lasts the folder is this run's: another is refused (run/run_folder.py). On entering a fresh run, an
    earlier run's files in it are moved to `earlier/<time>/`; with `resume=True` they are continued at the first step
    that is logged. An exception inside the block leaves `Status = FAILED` in the result file, a stop on a signal
    (run/preemption.py) `Status = PREEMPTED`, and goes on upwards. Only the main rank writes; all ranks call everything.

    Args:
        output_dir: where the files go.
        world: this process among the others, and its device.
        network: name of the project, e.g. "ViT_for_PyTorch".
        batch_size: samples per device and step, as in CaseName.
        case_kind: "acc" for a training run, "perf" for a short speed run.
        total_steps: length of the run in steps, for the progress bar and the estimate of the remaining time.
        log_every: steps between two lines.
        resume: continue the files that are there.
        skip_steps: first steps that do not count in FPS.
        fps_unit: unit printed with the final performance.
        profile: record a few steps (profile/step_profiler.py) and write `profile/` in the folder.
        evaluation: no training: nothing in the folder is moved or owned, so that it may run beside a training, whose
            metrics.jsonl it then leaves alone.
        needs_shared: every host writes into the folder (sharded checkpoints), so that all must share it.
        precision: of the matrix products, for MFU.
        tensorboard_dir: where TensorBoard's files go instead of the folder's tensorboard/.
    """

    def __init__(
        self,
        output_dir: str | Path,
        world: World,
        network: str,
        batch_size: int,
        case_kind: str = "acc",
        total_steps: int | None = None,
        log_every: int = 10,
        resume: bool = False,
        skip_steps: int = 10,
        fps_unit: str = "images/sec",
        profile: bool = False,
        evaluation: bool = False,
        needs_shared: bool = False,
        precision: str = "fp32",
        tensorboard_dir: str | Path | None = None,
    ):
        self.folder, self.world = Path(output_dir), world
        self.tensorboard_dir = Path(tensorboard_dir or self.folder / "tensorboard")
        self.total_steps, self.batch_size, self.fps_unit, self.precision = total_steps, batch_size, fps_unit, precision
        self.log_every = max(1, log_every)
        self.resume, self.evaluation, self.needs_shared = resume, evaluation, needs_shared
        self.result = ResultFile(
            self.folder, network, batch_size, world.size, case_kind, devices.describe(world.device)
        )
        self._clock = SteadyClock(world.device, skip_steps)
        self._profiler = StepProfiler(self.folder, network, world, total_steps) if profile else None
        self._dump = PrecisionDump(self.folder, world, of_training=not evaluation)
        self._window = Window()
        self._losses: dict[int, float] = {}  # by step
        self._has_trained = self._is_finished = False
        self._signals = Watch(saves=not evaluation)
        # of checkpoints, which say that steps are done; finished before the run ends or says that it was stopped
        self.writer = BackgroundWriter(lambda: self._metrics.sync() if world.is_main else None)
        self._held = contextlib.ExitStack()
        self._started = time.perf_counter()

    # -- the run as a whole ------------------------------------------------------------------------------------------

    def __enter__(self) -> RunLog:
        with contextlib.ExitStack() as held:  # let go of where something here fails
            lock = f".{self.result.case_name}.lock" if self.evaluation else folder_lock.NAME
            held.enter_context(run_folder.owned(self.folder, self.world, lock))
            held.enter_context(self._signals)
            held.enter_context(self._dump)
            try:
                if self.world.is_main:
                    self._open_files()
                self._check_hosts()
            except BaseException as error:
                if self.world.is_main and self.result.status() == "RUNNING":
                    with contextlib.suppress(OSError):
                        self.result.end(error)
                raise
            self._held = held.pop_all()
        is_shown = self.world.is_main and progress.has_terminal()
        self.progress = tqdm(total=self.total_steps, disable=not is_shown, unit="step")
        self._started = time.perf_counter()
        self._clock.start()
        return self

    def _open_files(self) -> None:
        metrics = self.folder / "metrics.jsonl"
        if self.evaluation:
            if folder_lock.living_owner(self.folder):
                metrics = self.folder / f"metrics_{self.result.case_name}.jsonl"
        else:
            boards.check()  # before anything is moved
            for line in run_folder.tidy(self.folder):
                print(f"note: {line}", flush=True)
            if self.resume:
                self._losses = read_losses(metrics)
            else:
                keep_aside(self.folder)
        self.result.begin(self.resume)
        self._metrics = MetricsFile(metrics)
        self._boards = boards.Boards(self.tensorboard_dir, self.folder, self.result.case_name)

    def _check_hosts(self) -> None:
        absent = ", ".join(run_folder.hosts_without(self.folder, self.world))
        if absent and self.needs_shared:
            raise UsageError(
                f"--output_dir {self.folder}: not shared by {absent}; sharded checkpoints need all hosts in it"
            )
        if absent and self.world.is_main:
            print(f"note: {self.folder} is not shared by {absent}: all files are on this host alone", flush=True)

    def __exit__(self, kind, error, traceback) -> None:
        name_place(error, self.folder)
        self.progress.close()
        try:
            with contextlib.suppress(Exception) if error else contextlib.nullcontext():
                self.writer.wait()
            if self.world.is_main:
                self._close_files(error)
        finally:
            self._held.__exit__(kind, error, traceback)

    def _close_files(self, error: BaseException | None) -> None:
        if isinstance(error, Preempted):
            self.info(str(error))
        try:
            if error is not None or not self._is_finished:
                self.result.end(error)
            if replay := getattr(error, "replay", None):  # of a step that was not finite
                (self.folder / "replay.json").write_text(json.dumps(replay, indent=1) + "\n", encoding="utf-8")
        except OSError as full:  # the first cause is the one to be told
            print(f"note: {self.folder}: {full.strerror}: the end of the run is not recorded", file=sys.stderr)
        self._boards.failed = error is not None
        for file in (self._metrics, self._boards):
            with contextlib.suppress(OSError) if error else contextlib.nullcontext():
                file.close()

    def finish(self, accuracy: float | None = None, loss: float | None = None, **extra: Any) -> dict[str, Any]:
        """Writes the loss plot, the loss list and the result file, and prints the final block.

        Args:
            accuracy: the run's quality in percent (or in the project's own unit); absent from the file when None.
            loss: the final loss; by default the mean over the last logged window.
            **extra: further `Key = value` lines of the result file; `AccuracyIs` says what the accuracy is.

        Returns:
            What the result file says.

        Raises:
            UsageError: a fresh training that did no step.
            FloatingPointError: the loss or the accuracy is inf or nan.
        """
        self._flush_window()
        self.writer.wait()
        if not (self.evaluation or self.resume or self._has_trained):
            raise UsageError("no training step was done, so there is no result: raise --max_steps or --epochs")
        self._tell(self._profiler.finish() if self._profiler else None)
        duration = time.perf_counter() - self._started
        fps, steady = self._clock.fps(), self._clock.is_steady
        if loss is None and self._losses:
            loss = self._losses[max(self._losses)]
        values: dict[str, Any] = {"E2ETrainingTime": round(duration, 2)}
        if fps is not None:
            values["ActualFPS"] = round(fps, 3)
            values["TrainingTime"] = round(self.batch_size * 1000 / fps, 2)  # as ModelZoo's scripts compute it
            values["StepTimeMs"] = round(1000 * self._clock.seconds_per_step(), 3)
        if loss is not None:
            values["ActualLoss"] = round(loss, 6)
        if accuracy is not None:
            values["TrainAccuracy"] = accuracy
        for key in ("ActualLoss", "TrainAccuracy"):
            if not math.isfinite(values.get(key, 0)):
                raise FloatingPointError(f"the result is not finite, {key} = {values[key]}: lower the learning rate")
        if fps is not None and not steady:
            values["FPSNote"] = "too few steps: the warm-up steps are counted"
        if fps is not None and steady and (flops := self._clock.flops_per_second()) and self.peak:
            values["MFU"] = round(100 * flops / self.peak, 3)
            each, source = self._peak
            values["MFUPeak"] = f"{each / 1e12:.4g} TFLOP/s a device in {self.precision} ({source})"
        values |= {"PeakMemoryMiB": devices.peak_memory_bytes(self.world.device) >> 20, **extra, "Status": "OK"}
        if not self._has_trained:
            values = self.result.with_done(values)
        if self.world.is_main:
            self._write_losses()
            self.progress.close()
            self.result.write(values)
            self.result.print_final(self.fps_unit)
        self._is_finished = True
        return self.result.values(values)

    # -- one step ----------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def data_wait(self) -> Iterator[None]:
        """Around fetching a batch: counts the wait as `data_ms`."""
        begin = time.perf_counter()
        yield
        seconds = time.perf_counter() - begin
        self._window.data_seconds += seconds
        if self._profiler:
            self._profiler.data_wait(seconds)

    @contextlib.contextmanager
    def pause(self, name: str) -> Iterator[None]:
        """Around an evaluation or a checkpoint: its time does not count in FPS and is recorded as `<name>_s`."""
        self._flush_window()
        begin = self._clock.pause()
        yield
        seconds = self._clock.go_on(begin)
        self._window.begin = time.perf_counter()
        if self._profiler:
            self._profiler.pause(name, seconds)
        self._write_metrics({"kind": "pause", "step": self._window.step, f"{name}_s": round(seconds, 3)})

    def step(
        self,
        step: int,
        samples: int,
        loss: Scalar,
        lr: float,
        grad_norm: Scalar | None = None,
        epoch: float | None = None,
        flops: float = 0.0,
        **extra: Scalar,
    ) -> None:
        """Records one optimizer step. Tensors stay on the device and are read only when a line is due.

        Args:
            step: steps done so far, counted from 1 over the whole run.
            samples: samples of this step over all ranks.
            loss: of this step; the line shows the mean over its window.
            lr: learning rate that this step used.
            grad_norm: before clipping.
            epoch: position in epochs.
            flops: of the model in this step over all ranks (run/utilisation.py), for MFU; 0 where it is not known.
            **extra: further scalars, averaged over the window like the loss (but see run/throughput.LAST).
        """
        if self.resume and not (self._has_trained or self._window.steps):
            self._continue_at(step)
        self._tell(self._dump.finish(step))
        self._clock.tick(samples, flops)
        scalars = {"loss": loss, "lr": lr, "grad_norm": grad_norm, **extra}
        self._window.add(step, samples, flops, epoch, {k: v for k, v in scalars.items() if v is not None})
        self.progress.update(step - self.progress.n)
        if step % self.log_every == 0 or step == self.total_steps:
            self._flush_window()
            self.writer.check()
        self._tell(self._profiler.step(step) if self._profiler else None)

    def preempted(self) -> bool:
        """Whether any rank was asked to stop, the same on all: call it once a step, see run/preemption.py."""
        return self._signals.agreed()

    def stopped(self, step: int, saved: bool = True) -> Preempted:
        """What to raise after `preempted`, with the checkpoint given to the writer: `raise log.stopped(step)`.

        Args:
            saved: False where the run was told to keep no checkpoints.
        """
        self.writer.wait()
        return self._signals.stopped(step, saved)

    def count(self, samples: int) -> None:
        """Counts samples of work that is no training step, such as an evaluated batch, in FPS."""
        self._clock.tick(samples)
        self._tell(self._profiler.step() if self._profiler else None)

    def record(self, step: int, kind: str, **scalars: Any) -> None:
        """Writes one line of another kind than training, e.g. `record(step, "eval", top1=81.2)`.

        The line also has `cpu_s`, the CPU seconds this process has used: the quality over them is time to quality.
        """
        values = {k: (v.item() if isinstance(v, torch.Tensor) else v) for k, v in scalars.items()}
        self._write_metrics({"kind": kind, "step": step, **values, "cpu_s": round(time.process_time(), 1)})
        if self.world.is_main:
            self._boards.write(kind, step, {k: v for k, v in values.items() if isinstance(v, int | float)})
        self.info(f"[{kind}] step {step} " + " ".join(f"{k} {_short(v)}" for k, v in values.items()))

    def info(self, message: str) -> None:
        """Prints on the main rank, above the progress bar."""
        if self.world.is_main:
            self.progress.write(message)

    @cached_property
    def _peak(self) -> tuple[float, str]:
        """Of one device; measured where no document says, when the first steady line needs it."""
        begin = self._clock.pause()
        found = utilisation.peak(self.world.device, self.precision) if self.world.is_main else (0.0, "")
        self._clock.go_on(begin)
        return found

    @property
    def peak(self) -> float:
        """FLOP/s of all devices."""
        return self._peak[0] * self.world.size

    # -- inside ------------------------------------------------------------------------------------------------------

    def _tell(self, message: str | None) -> None:
        if message:
            self.info(message)

    def _flush_window(self) -> None:
        window = self._window
        if window.steps == 0:
            return
        values = window.means()  # the one place where training waits for the device
        seconds = time.perf_counter() - window.begin
        line: dict[str, Any] = {"kind": "train", "step": window.step}
        if window.epoch is not None:
            line["epoch"] = round(window.epoch, 6)
        line |= values
        line["fps"] = round(window.samples / max(seconds, 1e-9), 3)
        line["data_ms"] = round(1000 * window.data_seconds / window.steps, 3)
        line["memory_mib"] = devices.peak_memory_bytes(self.world.device) >> 20
        if window.flops and self._clock.is_steady and self.peak:
            line["mfu"] = round(100 * window.flops / max(seconds, 1e-9) / self.peak, 3)
        self._window = Window(step=window.step)
        self._losses[window.step] = values["loss"]
        self._has_trained = True
        self._write_metrics(line)
        if self.world.is_main:
            scalars = {key: value for key, value in line.items() if key not in ("kind", "step")}
            self._boards.write("train", window.step, scalars)
        self.info(self._console_line(line))

    def _console_line(self, line: dict[str, Any]) -> str:
        total = f"/{self.total_steps}" if self.total_steps else ""
        scalars = {k: v for k, v in line.items() if k not in ("kind", "step")}
        text = f"step {line['step']}{total} " + " ".join(f"{k} {_short(v)}" for k, v in scalars.items())
        fps = self._clock.fps()
        if self.total_steps and fps and self._clock.is_steady:
            left = (self.total_steps - line["step"]) * self._clock.seconds_per_step()
            text += f" left {timedelta(seconds=round(left))}"  # as in "1 day, 2:03:04"
        return text

    def _write_metrics(self, line: dict[str, Any]) -> None:
        if self.world.is_main:
            self._metrics.write(line)

    def _continue_at(self, step: int) -> None:
        """A resumed run's first step: what the files know of it and of later ones was of a future that is no more."""
        self._losses = {known: loss for known, loss in self._losses.items() if known < step}
        if self.world.is_main:
            self._metrics.continue_at(step)
            self._boards.continue_at(step)

    def _write_losses(self) -> None:
        if not self._has_trained:  # an evaluation in a training's folder leaves its losses alone
            return
        losses = sorted(self._losses.items())
        name = f"train_{self.result.case_name}_loss"
        (self.folder / f"{name}.txt").write_text("".join(f"{loss:.6f}\n" for _, loss in losses))
        plot_loss(losses, self.folder / "loss.png", self.result.case_name, self.folder / "metrics.jsonl")


def _short(value: Any) -> str:
    return f"{value:.5g}" if isinstance(value, float) else str(value)
