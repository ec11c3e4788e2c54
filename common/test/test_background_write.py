"""A training stands still for a copy, not for the disk; what is written is what was given; no failure is lost."""

import threading

import pytest
import torch
from torch import nn

from common import checkpoint_file
from common.checkpoint.background_write import BackgroundWriter
from common.distributed import World
from common.run import result_file
from common.run_log import RunLog


def test_the_file_holds_what_was_given_whatever_happens_while_it_is_written(tmp_path):
    gate, writer = threading.Event(), BackgroundWriter()
    model = nn.Linear(4, 2)
    model.twin = model.weight  # one tensor under two names stays one
    given = {"model": model.state_dict(), "steps": [1, 2], "none": None}
    before = model.weight.detach().clone()

    def write(kept):
        gate.wait()
        checkpoint_file.save(kept, tmp_path / "a.pt")

    writer.submit(given, write)
    assert not (tmp_path / "a.pt").exists()  # the training is already going on
    with torch.no_grad():
        model.weight.add_(1.0)
    given["steps"].append(3)
    gate.set()
    writer.wait()
    loaded = checkpoint_file.load(tmp_path / "a.pt")
    assert torch.equal(loaded["model"]["weight"], before) and loaded["steps"] == [1, 2]
    assert loaded["model"]["weight"].data_ptr() == loaded["model"]["twin"].data_ptr()
    assert loaded["model"]._metadata == model.state_dict()._metadata
    writer.submit(given, lambda kept: checkpoint_file.save(kept, tmp_path / "b.pt"))  # into the first copy's memory
    writer.wait()
    assert torch.equal(checkpoint_file.load(tmp_path / "b.pt")["model"]["weight"], before + 1)
    assert torch.equal(checkpoint_file.load(tmp_path / "a.pt")["model"]["weight"], before)


def test_two_writes_never_overlap():
    writer, running, most = BackgroundWriter(), [], []

    def write(kept):
        running.append(kept)
        most.append(len(running))
        threading.Event().wait(0.02)
        running.remove(kept)

    for number in range(3):
        writer.submit(number, write)
    writer.wait()
    assert most == [1, 1, 1]


def test_no_step_waits_for_a_slow_disk(tmp_path, monkeypatch):
    """The log's lines are on it before a checkpoint that says so is; the thread of its writer waits for that."""
    gate, done = threading.Event(), []

    def slow(_):
        assert threading.current_thread() is not threading.main_thread() and gate.wait(600)
        done.append("lines")

    with RunLog(tmp_path, World(), "X", 1) as log:
        with monkeypatch.context() as patch:
            patch.setattr("common.run.metrics_file.os.fsync", slow)
            log.step(1, 1, 0.5, 0.1)
            with log.pause("checkpoint"):
                log.writer.submit({}, lambda _: done.append("checkpoint"))
            log.step(2, 1, 0.5, 0.1)
            assert done == []
            gate.set()
            log.writer.wait()
        assert done == ["lines", "checkpoint"]
        log.finish()


@pytest.mark.parametrize("ending", ["the next line", "the next save", "the end of the run"])
def test_a_disk_that_fails_behind_the_training_fails_the_run(tmp_path, ending):
    def write(_):
        raise OSError(28, "No space left on device", str(tmp_path / "checkpoint-1.pt"))

    world = World()
    with pytest.raises(OSError, match="No space left on device"), RunLog(tmp_path, world, "X", 1, log_every=1) as log:
        log.step(1, 1, 0.5, 0.1)
        log.writer.submit({}, write)
        if ending == "the next save":
            log.writer.submit({}, lambda _: None)
        if ending == "the next line":
            log.writer._thread.join()
            log.step(2, 1, 0.5, 0.1)
            pytest.fail("a step was done after the failure")
        log.finish()
    said = result_file.read(tmp_path / "X_bs1_1p_acc.log")
    assert said["Status"] == "FAILED" and "checkpoint-1.pt" in said["Error"]
