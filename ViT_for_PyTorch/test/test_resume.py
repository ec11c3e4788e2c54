"""Training that goes on: after kill -9, after a signal, with what may change, and not with another run's checkpoint."""

import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from test_run_vit import CASE, PROJECT, TINY, folders, losses, train

from common import checkpoint_file
from common.errors import UsageError
from common.run import result_file
from vit import engine


def test_kill_9_and_resume_give_the_run_that_was_not_interrupted(pictures, tmp_path):
    options = [
        "--epochs",
        "8",
        "--save_every",
        "5",
        "--log_every",
        "1",
        "optimizer.ema_decay=0.9",
        "model.drop_path=0.1",
    ]
    train(pictures, tmp_path / "whole", *options)

    command = [sys.executable, str(PROJECT / "run_vit.py"), *folders(pictures), *TINY, *options]
    command += ["--device", "cpu", "--output_dir", str(tmp_path / "killed"), "--num_workers", "1"]
    threads = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}  # the order of sums depends on it
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=threads)
    while not (tmp_path / "killed" / "checkpoints" / "checkpoint-10.pt").exists():
        assert process.poll() is None, "training ended before it could be killed"
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    at_kill = max(losses(tmp_path / "killed"))
    assert at_kill < 48

    train(pictures, tmp_path / "killed", *options, "--num_workers", "2", "--resume_training", "auto")
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")
    whole = checkpoint_file.load(tmp_path / "whole" / "checkpoints" / "checkpoint-48.pt")
    resumed = checkpoint_file.load(tmp_path / "killed" / "checkpoints" / "checkpoint-48.pt")
    for part in ("model", "ema"):
        assert whole[part].keys() == resumed[part].keys()
        assert all(torch.equal(whole[part][key], resumed[part][key]) for key in whole[part])
    assert whole["state"] == resumed["state"]


def test_a_changed_global_batch_is_not_resumed(pictures, tmp_path):
    train(pictures, tmp_path, "--epochs", "2")
    with pytest.raises(UsageError, match="global_batch was 4, is now 8.*so that it stays"):
        train(pictures, tmp_path, "--epochs", "2", "--batch_size", "8", "--resume_training", "auto")


def test_a_run_is_not_resumed_with_other_classes(pictures, tmp_path):
    root = tmp_path / "renamed"
    for split in ("train", "val"):
        for name, now in (("flags", "zebras"), ("food_and_drink", "food_and_drink"), ("symbols", "symbols")):
            (root / split).mkdir(parents=True, exist_ok=True)
            (root / split / now).symlink_to(pictures / split / name)
    train(pictures, tmp_path / "run", "--epochs", "1")
    with pytest.raises(UsageError, match="data.classes was .*flags.*, is now .*zebras.*--accept_changes"):
        train(root, tmp_path / "run", "--epochs", "2", "--resume_training", "auto")


def test_a_signal_saves_and_the_same_command_goes_on(pictures, tmp_path, monkeypatch):
    """TERM in mid-epoch: a checkpoint, exit status 75, and the continued run is the one that was not stopped."""
    options = ["--epochs", "2", "--log_every", "1", "--resume_training", "auto"]
    train(pictures, tmp_path / "whole", *options)
    step = engine.forward_backward

    def with_signal(run, number, *rest):
        if number == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(run, number, *rest)

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stopped:
        patch.setattr(engine, "forward_backward", with_signal)
        train(pictures, tmp_path / "stopped", *options)
    assert stopped.value.code == 75 and result_file.read(tmp_path / "stopped" / f"{CASE}.log")["Status"] == "PREEMPTED"
    assert checkpoint_file.newest(tmp_path / "stopped" / "checkpoints").name == "checkpoint-4.pt"
    assert train(pictures, tmp_path / "stopped", *options)["EvalCount"] == "13"
    assert losses(tmp_path / "stopped") == losses(tmp_path / "whole")


def test_what_changes_the_mathematics_is_accepted_by_name_and_then_takes_effect(pictures, tmp_path, capsys):
    train(pictures, tmp_path, "--epochs", "1")
    longer = ["--epochs", "2", "--resume_training", "auto", "optimizer.weight_decay=0.2"]
    with pytest.raises(UsageError, match="optimizer.weight_decay was 0.05, is now 0.2"):
        train(pictures, tmp_path, *longer)
    for other in ("model.train=head", "model.img_size=32"):
        with pytest.raises(UsageError, match="its weights or its optimizer do not fit with"):
            train(pictures, tmp_path, *longer, "--accept_changes", "all", other)
    train(pictures, tmp_path, *longer, "--accept_changes", "optimizer.weight_decay")
    assert "epochs 1 -> 2" in capsys.readouterr().out
    groups = checkpoint_file.load(tmp_path / "checkpoints" / "checkpoint-12.pt")["optimizer"]["param_groups"]
    assert {group["weight_decay"] for group in groups} == {0.0, 0.2}
