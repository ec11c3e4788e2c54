"""Checkpoint files survive crashes, are found again, and cannot run code."""

import argparse
import os
import pickle
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from common import checkpoint_file
from common.checkpoint import digests
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


def test_every_flipped_bit_is_noticed(tmp_path):
    """Anywhere in the file, its zip's directory and its digest included: 400 of 400."""
    path = checkpoint_file.save({"model": {"w": torch.rand(100)}, "step": 3}, tmp_path / "c.pt")
    whole, draw, noticed = path.read_bytes(), random.Random(0), 0
    for trial in range(400):
        bit = draw.randrange(8 * len(whole)) if trial > 100 else 8 * (len(whole) - 1 - trial) + draw.randrange(8)
        flipped = bytearray(whole)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        os.utime(path, ns=(trial, trial))
        try:
            checkpoint_file.load(path)
        except CheckpointError as error:
            noticed += "c.pt: not a readable checkpoint" in str(error)
    assert noticed == 400
    path.write_bytes(whole)
    assert checkpoint_file.load(path)["step"] == 3


def test_files_of_others_load_unchecked_and_torch_reads_ours(tmp_path):
    torch.save({"step": 1}, tmp_path / "theirs.pt")
    torch.save({"step": 2}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    assert [checkpoint_file.load(tmp_path / f"{name}.pt")["step"] for name in ("theirs", "old")] == [1, 2]
    ours = checkpoint_file.save({"w": torch.ones(3)}, tmp_path / "ours.pt")
    assert (
        torch.load(ours, weights_only=True)["w"].sum() == torch.load(ours, weights_only=True, mmap=True)["w"].sum() == 3
    )


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"<!DOCTYPE html><html><body>Sign in</body></html>", r"a web page \(HTML\), not weights.*Sign in"),
        (
            b'\n<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>',
            "an XML or HTML text, not weights.*Access",
        ),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "a Git LFS pointer"),
        (b"", "an empty file"),
        (b"\0" * 5000, "not a readable checkpoint"),
        (random.Random(1).randbytes(5000), "not a readable checkpoint"),
    ],
)
def test_what_is_no_checkpoint_is_called_what_it_is(tmp_path, content, words):
    (tmp_path / "w.pt").write_bytes(content)
    with pytest.raises(CheckpointError, match=f"w.pt: .*{words}"):
        checkpoint_file.load(tmp_path / "w.pt")


def test_another_programs_file_is_called_what_it_is(tmp_path):
    (tmp_path / "vit.onnx").write_bytes(b"\x08\x0a\x12\x07pytorch")
    with pytest.raises(CheckpointError, match="vit.onnx: an ONNX model.*give the PyTorch checkpoint"):
        checkpoint_file.load(tmp_path / "vit.onnx")


def test_a_foreign_file_and_a_half_folder_are_passed_over(tmp_path):
    checkpoint_file.save({"model": 1, "optimizer": 2}, tmp_path / "checkpoint-10.pt")
    checkpoint_file.save({"model": 1}, tmp_path / "checkpoint-20.pt")  # weights alone
    with pytest.warns(UserWarning, match="checkpoint-20.pt: no checkpoint of such a run .it has no optimizer"):
        assert checkpoint_file.newest(tmp_path, keys=("model", "optimizer")).name == "checkpoint-10.pt"


def folder_of_files(folder: Path) -> Path:
    (folder / "deep").mkdir(parents=True)
    for name in ("weights.safetensors", "optimizer.pt", "deep/rng.pth"):
        (folder / name).write_bytes(random.Random(name).randbytes(300))
    digests.seal(folder)
    return folder


def test_a_sealed_folder_notices_what_is_damaged_missing_or_cut(tmp_path):
    for step in (4, 6):
        folder_of_files(tmp_path / f"checkpoint-{step}")
    folder = tmp_path / "checkpoint-6"
    assert digests.damage(folder) is None
    draw = random.Random(0)
    for path in [path for path in folder.rglob("*") if path.is_file()]:
        whole = path.read_bytes()
        for trial in range(60):
            flipped = bytearray(whole)
            flipped[draw.randrange(len(whole))] ^= 1 << draw.randrange(8)
            path.write_bytes(flipped)
            os.utime(path, ns=(trial, trial))
            assert digests.damage(folder), path
        path.write_bytes(whole[:-1])
        assert digests.damage(folder), path
        path.unlink()
        with pytest.warns(UserWarning, match=f"checkpoint-6: .*{path.name}"):
            assert checkpoint_file.newest(tmp_path, "checkpoint-*").name == "checkpoint-4"
        path.write_bytes(whole)
    assert digests.damage(folder) is None
    digests.unseal(folder)
    assert "cut short" in digests.damage(folder)


def test_with_one_kept_there_is_always_a_whole_one(tmp_path):
    checkpoint_file.save({}, tmp_path / "checkpoint-10.pt")
    (tmp_path / "checkpoint-20.pt").write_bytes(b"PK\x03\x04 cut short")
    checkpoint_file.keep_newest(tmp_path, 1)
    assert digests.damage(tmp_path / "checkpoint-10.pt") is None  # not dropped for a damaged one
    checkpoint_file.save({}, tmp_path / "checkpoint-15.pt")
    checkpoint_file.keep_newest(tmp_path, 1)
    assert sorted(os.listdir(tmp_path)) == ["checkpoint-15.pt", "checkpoint-20.pt"]


def test_checkpoints_of_a_future_that_is_gone_are_set_aside(tmp_path):
    for step in (1, 2, 10):
        checkpoint_file.save({}, tmp_path / f"checkpoint-{step}.pt")
    checkpoint_file.save({}, tmp_path / "best-9.pt")
    checkpoint_file.set_aside_newer(tmp_path / "checkpoint-1.pt")
    assert sorted(p.name for p in tmp_path.glob("*.pt")) == ["best-9.pt", "checkpoint-1.pt"]
    assert len(list(tmp_path.glob("earlier/*/*.pt"))) == 2


def test_a_full_disk_is_named_and_what_was_there_stays(small_disk):
    path = checkpoint_file.save({"step": 1}, small_disk / "c.pt")
    with pytest.raises(OSError, match="No space left on device.*c.pt"):
        checkpoint_file.save({"w": torch.rand(1 << 20)}, path)
    assert checkpoint_file.load(path) == {"step": 1} and os.listdir(small_disk) == ["c.pt"]
