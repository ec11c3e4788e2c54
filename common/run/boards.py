"""Where a run's scalars are looked at: TensorBoard, and Weights & Biases where WANDB_PROJECT names a project."""

from __future__ import annotations

import importlib
import os
import threading
from pathlib import Path
from types import ModuleType

from common.errors import UsageError


class Boards:
    """Every board of a run, each told the same.

    Args:
        tensorboard_dir: TensorBoard's event files.
        folder: the run's output folder; wandb's own files go to `wandb/` in it.
        name: of the run, for wandb.
    """

    def __init__(self, tensorboard_dir: Path, folder: Path, name: str):
        self.failed = False  # to be set before `close`
        self._boards: list[TensorBoard | Wandb] = [TensorBoard(tensorboard_dir)]
        if project := os.environ.get("WANDB_PROJECT"):
            self._boards.append(Wandb(project, folder, name))

    def write(self, kind: str, step: int, scalars: dict[str, float]) -> None:
        for board in self._boards:
            board.write(kind, step, scalars)

    def continue_at(self, step: int) -> None:
        for board in self._boards:
            board.continue_at(step)

    def close(self) -> None:
        for board in self._boards:
            board.close(self.failed)


def check() -> None:
    """Before a run touches anything: UsageError where WANDB_PROJECT asks for wandb, which is not installed."""
    if project := os.environ.get("WANDB_PROJECT"):
        _wandb(project)


class TensorBoard:
    """TensorBoard's event file of a run."""

    def __init__(self, folder: Path):
        from torch.utils.tensorboard import SummaryWriter  # half a second of imports, on the main rank only

        self.folder, self._writer = folder, SummaryWriter(str(folder))
        # a full disk ends the writer's thread: the next `write` says so, and the thread's traceback nothing more
        self._hook, threading.excepthook = threading.excepthook, self._pass_on

    def write(self, kind: str, step: int, scalars: dict[str, float]) -> None:
        """OSError, naming the folder, where the disk is full or the folder was deleted."""
        try:
            for key, value in scalars.items():
                self._writer.add_scalar(f"{kind}/{key}", value, step)
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.folder)) from error

    def continue_at(self, step: int) -> None:
        """Readers drop what earlier files have of `step` and later ones."""
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog

        start = Event(step=step, session_log=SessionLog(status=SessionLog.START))
        self._writer.file_writer.add_event(start)

    def close(self, failed: bool) -> None:
        try:
            self._writer.close()
        finally:
            threading.excepthook = self._hook

    def _pass_on(self, problem: threading.ExceptHookArgs) -> None:
        if not issubclass(problem.exc_type, OSError):
            self._hook(problem)


class Wandb:
    """A run of Weights & Biases (`pip install wandb`). Its variables say the rest: WANDB_MODE=offline, WANDB_ENTITY.

    A resumed run is a run of its own there, unless WANDB_RUN_ID names the one to go on in.

    Raises:
        UsageError: wandb is not installed, or does not start.
    """

    def __init__(self, project: str, folder: Path, name: str):
        wandb = _wandb(project)
        try:
            self._run = wandb.init(project=project, dir=str(folder), name=name)
        except wandb.Error as error:
            raise UsageError(
                f"WANDB_PROJECT={project}: {error}: use WANDB_MODE=offline, or unset WANDB_PROJECT"
            ) from error

    def write(self, kind: str, step: int, scalars: dict[str, float]) -> None:
        # the step is a value of its own: wandb's must not fall, and an evaluation comes after its step's line
        self._run.log({"step": step} | {f"{kind}/{key}": value for key, value in scalars.items()})

    def continue_at(self, step: int) -> None:
        """What wandb has of later steps stays; they come again."""

    def close(self, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))


def _wandb(project: str) -> ModuleType:
    try:
        return importlib.import_module("wandb")
    except ModuleNotFoundError:
        raise UsageError(
            f"WANDB_PROJECT={project}: wandb is not installed: pip install wandb, or unset WANDB_PROJECT"
        ) from None
