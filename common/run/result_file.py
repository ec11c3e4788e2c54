"""The ModelZoo result file `${CaseName}.log`: its name, its keys, and keeping earlier ones."""

from __future__ import annotations

import contextlib
import os
import platform
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common.errors import Preempted
from common.run import folder_lock

KEYS = (
    "Network RankSize BatchSize DeviceType CaseName ActualFPS TrainingTime ActualLoss E2ETrainingTime TrainAccuracy"
).split()
# what a training run leaves in its folder
OF_A_RUN = tuple(
    "metrics.jsonl tensorboard profile* dump_precision loss.png codebook_use.png log.txt replay.json train_*_loss.txt "
    "checkpoint* *_acc.log *_perf.log".split()
)


class ResultFile:
    """`Key = value` lines in the spelling that ModelZoo's collectors read, plus `Status`: RUNNING, OK, FAILED,
    PREEMPTED.

    Keys that are ModelZoo's have the values of its scripts: `DeviceType` is `uname -m`, `TrainingTime` is BatchSize x
    1000 / ActualFPS, in milliseconds, where ActualFPS is over all ranks; `E2ETrainingTime` is in seconds. What we say
    of the same things is in `DeviceName` and `StepTimeMs`. A key without a value is left out rather than written empty.

    Args:
        device_name: of the card; empty where nobody knows it yet.
    """

    def __init__(
        self, folder: Path, network: str, batch_size: int | str, rank_size: int, case_kind: str, device_name: str
    ):
        if case_kind not in ("acc", "perf"):
            raise ValueError(f"case kind {case_kind!r}: acc or perf")
        self.case_name = f"{network}_bs{batch_size}_{rank_size}p_{case_kind}"
        self.path = Path(folder) / f"{self.case_name}.log"
        self._fixed = {"Network": network, "RankSize": rank_size, "BatchSize": batch_size}
        self._fixed |= {"DeviceType": platform.machine(), "CaseName": self.case_name}
        if device_name:
            self._fixed["DeviceName"] = device_name
        self._last: dict[str, Any] = {}
        self._done: dict[str, str] = {}

    def values(self, measured: dict[str, Any]) -> dict[str, Any]:
        """All keys in the order of the file."""
        merged = {**self._fixed, **measured}
        return {key: merged[key] for key in (*KEYS, *merged) if key in merged}

    def begin(self, goes_on: bool) -> None:
        """Writes `Status = RUNNING`; of a run that is done, and is started again, the result is remembered."""
        self._done = read(self.path) if goes_on and self.status() == "OK" else {}
        self.write({"Status": "RUNNING"})

    def with_done(self, measured: dict[str, Any]) -> dict[str, Any]:
        """The result of a start that did no step: what the run had measured when done, and what was measured now."""
        stays = {key: value for key, value in self._done.items() if key not in measured or key == "E2ETrainingTime"}
        return measured | stays

    def write(self, measured: dict[str, Any]) -> None:
        """Replaces the file. OSError names the path."""
        self._last = self.values(measured)
        replace(self.path, self._last)

    def end(self, error: BaseException | None) -> None:
        """Writes how a run ended that has no result: PREEMPTED, or FAILED with the reason. OSError names the path."""
        if isinstance(error, Preempted):
            self.write({"Status": "PREEMPTED", "Note": str(error)})
            return
        reason = "the run ended without a result"
        if error is not None:
            reason = ": ".join([type(error).__name__, *str(error).strip().splitlines()[-1:]])
        self.write({"Status": "FAILED", "Error": reason})

    def status(self) -> str | None:
        """Status of the file on disk, None without one."""
        return read(self.path).get("Status") if self.path.exists() else None

    def print_final(self, fps_unit: str) -> None:
        """The block that ModelZoo users read off the end."""
        print("------------------ Final result ------------------")
        if "ActualFPS" in self._last:
            print(f"Final Performance {fps_unit} : {self._last['ActualFPS']}")
        if "TrainAccuracy" in self._last:
            print(f"Final Train Accuracy : {self._last['TrainAccuracy']}")  # ModelZoo's words, of whatever it is
        print(f"E2E Training Duration sec : {self._last['E2ETrainingTime']}", flush=True)
        if "AccuracyIs" in self._last:
            print(f"Accuracy is : {self._last['AccuracyIs']}", flush=True)


def replace(path: Path, values: dict[str, Any]) -> None:
    """Writes a result file at once, so that a reader never sees half of it; on a full disk in the old one's place.

    Raises:
        OSError: naming the path. An older result is then gone: it must not be taken for this run's.
    """
    text = "".join(f"{key} = {' '.join(str(value).split())}\n" for key, value in values.items()).encode()
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(text)
        os.replace(temporary, path)
    except OSError as full:
        try:
            temporary.unlink(missing_ok=True)
            with open(path, "r+b") as file:  # its block is there already
                file.write(text)
                file.truncate()
        except OSError:
            with contextlib.suppress(OSError):
                path.unlink()
            raise OSError(full.errno, full.strerror, str(path)) from full


def read(path: str | Path) -> dict[str, str]:
    """The `Key = value` lines of a result file."""
    pairs = (line.split(" = ", 1) for line in Path(path).read_text("utf-8", "replace").splitlines() if " = " in line)
    return dict(pairs)


def end_stale(folder: Path) -> list[Path]:
    """A result that says RUNNING while nobody runs in the folder becomes FAILED: its run was killed with all around it.

    Not that of a living training or evaluation, by their locks. The owner of the folder calls it before it writes.

    Returns:
        The files that were changed.
    """
    ended = []
    for path in [*folder.glob("*_acc.log"), *folder.glob("*_perf.log")]:
        values = read(path)
        if values.get("Status") == "RUNNING" and folder_lock.living_owner(folder, f".{path.stem}.lock") is None:
            error = "the run ended without a word (killed, or its host lost); found by the next start"
            replace(path, values | {"Status": "FAILED", "Error": error})
            ended.append(path)
    return ended


def keep_aside(folder: Path, patterns: Sequence[str] = OF_A_RUN) -> Path | None:
    """Moves an earlier run's files to `earlier/<time>/` in the folder; returns that folder, None when there were none.

    Launcher logs (train_*.log) stay: they are being written already, and the launcher has seen to them.
    """
    found = [path for pattern in patterns for path in folder.glob(pattern)]
    if not found:
        return None
    aside = folder / "earlier" / time.strftime("%Y%m%d-%H%M%S")
    while aside.exists():
        aside = aside.with_name(aside.name + "x")
    aside.mkdir(parents=True)
    for path in found:
        path.rename(aside / path.name)
    return aside
