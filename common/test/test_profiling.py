"""Which steps --profile records, and what its page says of them."""

from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader

from common import npu
from common.distributed import World
from common.errors import UsageError
from common.profile import step_profiler
from common.profile import summary as profile_summary
from common.profile.step_profiler import StepProfiler
from common.profile.summary import Cost, Window
from common.run_log import RunLog


def read_a_value(pictures: list[torch.Tensor]) -> torch.Tensor:
    pictures[0].sum().item()  # the loader's own read is no wait for a device
    return pictures[0]


def train(folder: Path, steps: range, total: int | None, rank: int = 0) -> str | None:
    """Steps of a tiny loop; each has one product and one value that is read. Returns the summary."""
    world = World(rank=rank, size=rank + 1)
    batches = iter(DataLoader([torch.ones(8, 8)] * 60, collate_fn=read_a_value))
    with RunLog(folder, world, "Net", batch_size=1, total_steps=total, log_every=100, resume=True, profile=True) as log:
        for step in steps:
            with log.data_wait():
                x = next(batches)
            (x @ x).sum().item()
            log.step(step, samples=1, loss=1.0, lr=0.1)
            if step == 11:
                with log.pause("evaluate"):
                    torch.ones(4).cumsum(0)
        log.finish()
    pages = sorted(folder.glob("profile*/summary.txt"))
    return pages[-1].read_text() if pages else None


@pytest.mark.parametrize(
    ("steps", "total", "recorded"),
    [
        (range(1, 21), 20, "steps 10 to 12"),
        (range(1, 21), None, "steps 10 to 12"),
        (range(31, 51), 50, "steps 10 to 12"),  # resumed: counted from its own beginning
        (range(1, 6), 5, "steps 3 to 5"),
        (range(1, 3), 2, "steps 2 to 2"),
        (range(48, 51), 50, "steps 2 to 3"),
        (range(1, 12), 100, "steps 10 to 11"),  # ended early
    ],
)
def test_the_recorded_steps_are_late_ones_and_never_the_first(tmp_path, steps, total, recorded):
    text = train(tmp_path, steps, total)
    assert f"Net, {recorded} of this run" in text
    calls = [line.split()[2] for line in text.splitlines() if line.endswith(" aten::mm") and len(line.split()) == 4]
    assert calls == ["1"], text
    assert "aten::_local_scalar_dense 1 (" in text
    assert ("pause" in text and "evaluate" in text) == (
        recorded in ("steps 10 to 12", "steps 10 to 11") and 11 in steps
    )


def test_a_run_too_short_to_record_says_so(tmp_path, capsys):
    with pytest.raises(UsageError, match="one step"):
        train(tmp_path, range(1, 2), 1)
    assert list(tmp_path.iterdir()) == []  # before anything was written
    assert train(tmp_path, range(50, 51), 50) is None
    assert "nothing was recorded" in capsys.readouterr().out


def test_a_second_profile_does_not_overwrite_the_first_and_other_ranks_write_none(tmp_path):
    train(tmp_path, range(1, 13), 24)
    train(tmp_path, range(13, 25), 24)
    assert {path.name for path in tmp_path.glob("profile*")} == {"profile", "profile-2"}
    profiler = StepProfiler(tmp_path / "other", "Net", World(rank=1, size=2), 24)
    assert [profiler.step(step) for step in range(1, 25)] == [None] * 24 and profiler.finish() is None
    assert not (tmp_path / "other").exists()


def test_the_page_reads_what_torch_npu_writes(tmp_path):
    """Columns as in torch_npu 2.13's _operator_view_parser.py; a row is one call. Simulated: not from a card."""
    folder = tmp_path / "host_1_20260101000000_ascend_pt" / "ASCEND_PROFILER_OUTPUT"
    folder.mkdir(parents=True)
    head = "Name,Input Shapes,Call Stack,Host Self Duration(us),Host Total Duration(us),Device Self Duration(us)"
    rows = [
        "aten::mm,,,10,12,3000",
        "aten::mm,,,10,12,3000",
        "aten::item,,,5,900,0",
        "aten::_local_scalar_dense,,,895,895,",
    ]
    (folder / "operator_details.csv").write_text("\n".join([head, *rows]) + "\n")
    trace, costs = profile_summary.from_torch_npu(tmp_path)
    assert trace == folder.parent and costs[0] == Cost("aten::mm", 2, 0.02, 6.0, 0)
    text = profile_summary.summary("Net", Window(seconds=0.02, steps=2, data_seconds=0.005), costs, trace)
    assert "operators by device time" in text and "  100.0             1  aten::mm" in text
    assert "host syncs             0.5 a step: aten::_local_scalar_dense 0.5" in text
    assert "2.50 ms a step, 25.0 %" in text

    (folder / "operator_details.csv").unlink()
    trace, costs = profile_summary.from_torch_npu(tmp_path)
    assert costs == [] and "no list of operators" in profile_summary.summary("Net", Window(1.0, 1), costs, trace)


@pytest.mark.parametrize(("steps", "calls"), [(20, "start step step step stop"), (11, "start step step stop")])
def test_torch_npu_s_profiler_hears_of_every_step(tmp_path, monkeypatch, steps, calls):
    heard = []

    class Session:
        def __getattr__(self, name):
            return lambda: heard.append(name)

    monkeypatch.setattr(npu, "is_npu", lambda device: True)
    monkeypatch.setattr(step_profiler, "npu_profiler", lambda folder, count: Session() if count == 3 else None)
    profiler = StepProfiler(tmp_path, "Net", World(), total_steps=None)
    for _ in range(steps):
        profiler.step()
    profiler.finish()
    assert " ".join(heard) == calls
    assert "no list of operators" in (tmp_path / "profile" / "summary.txt").read_text()
