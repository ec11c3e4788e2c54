"""Shards are written while two ranks train on: what was saved or nothing, one write at a time, no error lost."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from common import shards
from common.checkpoint import digests

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = """
import os, pathlib, signal, sys, threading
sys.path.insert(0, sys.argv[2])
import torch
from torch import nn
from common import distributed, shards
from common.checkpoint import digests
from common.checkpoint.background_write import BackgroundWriter

out, gate, sealing, written = pathlib.Path(sys.argv[1]), threading.Event(), threading.Event(), []
seal = digests.seal


def held(folder, files=None):
    sealing.set()
    assert gate.wait(600)
    seal(folder, files)


def whole():
    return {name: value.clone() for name, value in shards.whole_state(model).items()}


with distributed.process_group("cpu") as world:
    torch.manual_seed(0)
    model, writer = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4)), BackgroundWriter()
    shards.shard(model, list(model), world, "fp32")
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    folder = out / "checkpoint-sharded"

    def train(steps):
        for _ in range(steps):
            model(torch.randn(2, 8)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()

    def save(number):
        then = lambda: written.append(number)
        shards.save_shards(folder, {"number": number}, optimizer, model, writer, then)

    train(1)
    save(1)
    digests.seal = held
    gate.set()
    writer.wait()
    gate.clear()
    train(1)
    save(2)
    train(3)  # collectives of both threads at once
    distributed.barrier()
    assert shards.load_progress(folder) == {"number": 1} and written == [1] * world.is_main
    threading.Timer(0.5, gate.set).start()
    save(3)  # waits for the second
    assert written[:2] == [1, 2] or not world.is_main
    writer.wait()

    digests_of = digests.digests_of
    def full(*_):
        raise OSError(28, "No space left on device", str(folder))
    if world.rank == 1:
        digests.digests_of = full
    save(4)
    try:
        writer.wait()
    except OSError as error:
        assert "No space left on device" in str(error) and str(folder) in str(error)
        (out / f"told{world.rank}").touch()
    digests.digests_of = digests_of
    assert shards.load_progress(folder) == {"number": 3}

    saved = whole()
    save(5)
    train(1)
    writer.wait()
    if world.is_main:
        torch.save(saved, out / "whole.pt")
    gate.clear()
    sealing.clear()
    save(6)
    assert not world.is_main or sealing.wait(600)
    distributed.barrier()
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture(scope="module")
def out(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    (folder / "script.py").write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += [str(folder / "script.py"), str(folder), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert "SIGKILL" in done.stderr and (folder / "whole.pt").exists(), done.stderr
    return folder


def test_ranks_killed_in_mid_write_leave_the_one_before_with_what_was_saved(out):
    folder = out / "checkpoint-sharded"
    assert shards.load_progress(folder) == {"number": 5}
    expected = torch.load(out / "whole.pt", weights_only=True)
    found = shards.read_shards(folder)["model"]
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert (out / ".checkpoint-sharded.writing").is_dir()  # half of the sixth
    assert digests.damage(out / ".checkpoint-sharded.writing") is not None


def test_the_failure_of_one_rank_s_disk_is_told_on_all(out):
    assert (out / "told0").exists() and (out / "told1").exists()
