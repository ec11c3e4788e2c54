"""Checkpoint files survive crashes, are found again, and cannot run code."""

import argparse
import os
import pickle
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from common import checkpoint_file
from common.checkpoint_file import CheckpointError

ROOT = Path(__file__).resolve().parents[2]


class Hostile:
    def __reduce__(self):
        return (os.system, ("touch hostile_was_here",))


def test_round_trip_with_the_harmless_types_that_references_use(tmp_path):
    path = checkpoint_file.save({"w": torch.arange(3), "args": argparse.Namespace(lr=0.1)}, tmp_path / "a" / "c.pt")
    loaded = checkpoint_file.load(path)
    assert loaded["w"].tolist() == [0, 1, 2] and loaded["args"].lr == 0.1
    assert os.listdir(path.parent) == ["c.pt"]  # no temporary file is left


def test_a_hostile_pickle_is_refused_and_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"w": Hostile()}, tmp_path / "zip.pt")
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(Hostile()))
    for name in ("zip.pt", "plain.pt"):
        with pytest.raises(CheckpointError, match=rf"{name}: .*(posix.system|refused)"):
            checkpoint_file.load(tmp_path / name)
    assert not (tmp_path / "hostile_was_here").exists()


def test_missing_and_truncated_files_are_named(tmp_path):
    with pytest.raises(CheckpointError, match="gone.pt: no such"):
        checkpoint_file.load(tmp_path / "gone.pt")
    path = checkpoint_file.save({"w": torch.rand(1000)}, tmp_path / "cut.pt")
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(CheckpointError, match="cut.pt: not a readable checkpoint"):
        checkpoint_file.load(path)


def test_newest_goes_by_number_and_passes_over_a_damaged_file(tmp_path):
    assert checkpoint_file.newest(tmp_path) is None
    for step in (9, 10, 100):
        checkpoint_file.save({"step": step}, tmp_path / f"checkpoint-{step}.pt")
    os.utime(tmp_path / "checkpoint-9.pt", (time.time() + 100,) * 2)  # touched later, but still older
    assert checkpoint_file.newest(tmp_path).name == "checkpoint-100.pt"
    newest = tmp_path / "checkpoint-100.pt"
    newest.write_bytes(newest.read_bytes()[:-50])
    with pytest.warns(UserWarning, match="checkpoint-100.pt"):
        assert checkpoint_file.newest(tmp_path).name == "checkpoint-10.pt"


def test_keep_newest_spares_best_and_last(tmp_path):
    for name in ("checkpoint-1.pt", "checkpoint-2.pt", "checkpoint-10.pt", "best-1.pt", "last.pt"):
        checkpoint_file.save({}, tmp_path / name)
    checkpoint_file.keep_newest(tmp_path, 2)
    assert sorted(os.listdir(tmp_path)) == ["best-1.pt", "checkpoint-10.pt", "checkpoint-2.pt", "last.pt"]


def test_kill_during_a_save_leaves_the_old_file_whole(tmp_path):
    path = checkpoint_file.save({"step": 1}, tmp_path / "c.pt")
    code = (
        "import os, signal, sys, torch\n"
        "from common import checkpoint_file\n"
        "real = torch.save\n"
        "def killed_half_way(obj, file):\n"
        "    file.write(b'half'); file.flush(); os.kill(os.getpid(), signal.SIGKILL)\n"
        "torch.save = killed_half_way\n"
        "checkpoint_file.save({'step': 2}, sys.argv[1])\n"
    )
    assert subprocess.run([sys.executable, "-c", code, str(path)], cwd=ROOT).returncode == -9
    assert checkpoint_file.load(path) == {"step": 1}
    assert checkpoint_file.newest(tmp_path) == path  # the half file is not taken for a checkpoint


def test_a_failing_save_removes_its_temporary_file(tmp_path):
    with pytest.raises((pickle.PicklingError, AttributeError, TypeError)):
        checkpoint_file.save({"f": lambda: 0}, tmp_path / "c.pt")
    assert os.listdir(tmp_path) == []
