"""How a run ended: the first cause among its ranks, and the status in its result file."""

from __future__ import annotations

import re
import signal
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from common.errors import PREEMPTED
from common.network.lost_ranks import is_about_others
from common.run import folder_lock, result_file

_TAIL_BYTES = 200_000
_OF_RANK = re.compile(r"^\[rank\d+\]:\s?", re.MULTILINE)  # torch puts it before each line of a traceback


@dataclass
class Case:
    """What the name of a result file is made of, and the result files that were there before the run."""

    output_dir: str
    network: str
    batch_size: str
    ranks: int
    case_kind: str
    before: dict[str, list[int]]
    is_first_node: bool = True

    @classmethod
    def begin(
        cls, output_dir: str, network: str, batch_size: str, ranks: int, case_kind: str, is_first_node: bool = True
    ) -> Case:
        case = cls(output_dir, network, batch_size, ranks, case_kind, {}, is_first_node)
        case.before = {path.name: _stamp(path) for path in case.files()}
        return case

    def files(self) -> list[Path]:
        """Result files of this network and kind, of any number of ranks: with --min_nodes a run may shrink."""
        pattern = f"{_literal(self.network)}_bs*p_{self.case_kind}.log"
        return sorted(path for path in Path(self.output_dir).glob(pattern) if path.is_file())

    def as_dict(self) -> dict:
        return asdict(self)


class Ended:
    """One rank that has ended: with which exit code, and what its log says of the reason."""

    def __init__(self, rank: int, code: int, log: str):
        self.rank, self.log = rank, log
        text = "" if code in (0, PREEMPTED) else log_of_run(log)
        reason = reason_in(text)
        self.by_itself = bool(reason) or code != 128 + signal.SIGTERM
        # one that torchrun ended while it was still closing down after its own error
        self.code = 1 if reason and code == 128 + signal.SIGTERM else code
        self.cause = reason or _signal_of(code) or last_line(text) or "no word in its log"


def first_cause(ended: Sequence[Ended]) -> Ended | None:
    """Of the ranks in order of their end, the one that the others followed; None when none failed.

    A rank that lost its peers may end before the rank that they lost, and torchrun ends the rest by SIGTERM: such ends
    count only where there is no other.
    """
    failed = [one for one in ended if one.code not in (0, PREEMPTED)]
    by_itself = [one for one in failed if one.by_itself]
    causes = [one for one in by_itself if not is_about_others(one.cause)]
    return next(iter(causes or by_itself or failed), None)


def reason_in(text: str) -> str:
    """The `error: ...` line or the exception that a log ends with, empty without."""
    lines = _OF_RANK.sub("", text).splitlines()
    for index in range(len(lines) - 1, -1, -1):
        if lines[index].startswith("error: "):
            return lines[index].removeprefix("error: ")
        if lines[index].startswith("Traceback (most recent call last):"):
            raised = (line for line in lines[index + 1 :] if line and not line[0].isspace())
            return next(raised, "")[:500]
    return ""


def last_line(text: str) -> str:
    return next((line[:500] for line in reversed(text.splitlines()) if line.strip()), "")


def _signal_of(code: int) -> str:
    try:
        name = signal.Signals(code - 128).name
    except ValueError:
        return ""
    # the kernel's out-of-memory killer leaves no word in a log
    return f"ended by {name}" + (" (out of memory? see dmesg)" if name == "SIGKILL" else "")


def log_of_run(path: str) -> str:
    """The end of a rank's log, of its last start only: earlier runs are in the same file."""
    try:
        with open(path, "rb") as file:
            file.seek(max(0, file.seek(0, 2) - _TAIL_BYTES))
            text = file.read().decode("utf-8", "replace")
    except OSError:
        return ""
    _, mark, rest = text.rpartition("\n==== ")
    text = rest if mark else text.removeprefix("==== ")
    return text.partition("\n")[2]


def conclude(case: Case, status: str, error: str | None, keep_own_words: bool = False) -> None:
    """Writes the status of a run that did not end well, unless the folder belongs to another run, which lives.

    With `keep_own_words` what rank 0 wrote of the same status stays. A result file that this run has not touched
    belongs to an earlier one, and is kept aside when that ended well.
    """
    folder = Path(case.output_dir)
    if not case.is_first_node and (folder / folder_lock.NAME).exists():
        return  # of rank 0 on another host, whose launcher sees to it
    if folder_lock.living_owner(folder):
        return
    mine = [path for path in case.files() if _stamp(path) != case.before.get(path.name)]
    told = {"Status": status} if error is None else {"Status": status, "Error": error}
    for path in mine:
        values = result_file.read(path)
        if not (keep_own_words and values.get("Status") == status):
            result_file.replace(path, values | told)
    if mine:
        return
    file = result_file.ResultFile(folder, case.network, case.batch_size, case.ranks, case.case_kind, "")
    if file.status() == "OK":
        result_file.keep_aside(folder, [file.path.name])
    file.write(told)


def tidy(folder: str) -> None:
    """What a killed run left saying RUNNING, unless a run lives in the folder."""
    if folder_lock.living_owner(folder) is None:
        for path in result_file.end_stale(Path(folder)):
            print(f"note: {path} said RUNNING, its run is gone: FAILED", flush=True)


def _stamp(path: Path) -> list[int]:
    status = path.stat()
    return [status.st_mtime_ns, status.st_size, status.st_ino]


def _literal(name: str) -> str:
    return re.sub(r"([*?[])", r"[\1]", name)
