"""A run that is stopped, damaged or continued as another one: what its folder and its checkpoints say and do."""

import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from small_runs import last, lines, words

from common import checkpoint_file
from data2vec import IndexedDataset
from data2vec.data.indexed_dataset import write_corpus


@pytest.fixture
def options(project, golden):
    def of(output, *more, data=golden / "bin"):
        return words(project / "test", "tiny", data, output, *more)

    return of


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_stopped_run_saves_and_goes_on_bit_for_bit(project, options, tmp_path, ranks, capsys):
    import train

    settings = ["optimization.max_update=60", "model.transformer.dropout=0.1", "dataset.disable_validation=true"]
    launcher = [] if ranks == 1 else ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]

    def start(output):
        command = [sys.executable, *launcher, "train.py", *options(output, *settings)]
        return subprocess.Popen(command, cwd=project, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    stopped, output = start(tmp_path / "parts"), ""
    for line in stopped.stdout:
        output += line
        if line.startswith("step 4/"):
            stopped.send_signal(signal.SIGTERM)
            break
    output += stopped.communicate(timeout=600)[0]
    saved = last(tmp_path / "parts")
    done = saved["optimizer_history"][-1]["num_updates"]
    assert 4 <= done < 60 and "Status = PREEMPTED" in next((tmp_path / "parts").glob("*_acc.log")).read_text(), output
    if ranks == 2:  # the rest is the same
        return
    assert stopped.returncode == 75
    train.main(options(tmp_path / "parts", *settings))
    assert f"update {done}" in capsys.readouterr().out
    train.main(options(tmp_path / "whole", *settings))
    for name, value in last(tmp_path / "whole")["model"].items():
        if name != "encoder._ema":
            assert torch.equal(value, last(tmp_path / "parts")["model"][name]), name
    steps = [line["step"] for line in lines(tmp_path / "parts", "train")]
    assert steps == sorted(set(steps))


def test_a_damaged_checkpoint_is_passed_over(project, options, tmp_path):
    import train

    settings = ["--save_every", "3", "dataset.disable_validation=true"]
    train.main(options(tmp_path, *settings, "--max_steps", "7"))
    path = tmp_path / "checkpoints/checkpoint_last.pt"
    content = bytearray(path.read_bytes())
    rng = np.random.default_rng(0)
    for place in rng.integers(0, len(content), 12):
        damaged = bytearray(content)
        damaged[place] ^= 1 << int(rng.integers(8))
        path.write_bytes(damaged)
        with pytest.raises(checkpoint_file.CheckpointError):
            checkpoint_file.load(path)
    with pytest.warns(UserWarning, match="going on from .*checkpoint_1_6.pt, the newest whole checkpoint"):
        train.main(options(tmp_path, *settings, "--max_steps", "8"))
    assert last(tmp_path)["optimizer_history"][-1]["num_updates"] == 8
    shutil.rmtree(tmp_path / "checkpoints")
    path.parent.mkdir()
    path.write_bytes(damaged)
    with pytest.raises(SystemExit, match="no other checkpoint there is whole; --resume none begins anew"):
        train.main(options(tmp_path, *settings))


def test_a_resumed_run_is_the_same_run(project, golden, options, tmp_path, capsys):
    import train

    train.main(options(tmp_path / "run", "--max_steps", "2"))
    other = tmp_path / "other"
    shutil.copytree(golden / "bin", other)
    whole = IndexedDataset(golden / "bin/train")
    for file in other.glob("train.*"):
        file.unlink()
    write_corpus(other / "train", [whole[i].numpy()[::-1] for i in range(len(whole))], np.uint16)
    for change, said in (
        (["task.mask_prob=0.5"], "settings.task.mask_prob was 0.35, is now 0.5"),
        (["--seed", "2"], "settings.common.seed was 1, is now 2"),
        (["--precision", "bf16"], "precision was 'fp32', is now 'bf16'"),
        (["optimizer.weight_decay=0.1"], "settings.optimizer.weight_decay was 0.01, is now 0.1"),
        (["model.transformer.dropout=0.3"], "settings.model.transformer.dropout was 0.0, is now 0.3"),
    ):
        with pytest.raises(SystemExit, match=said):
            train.main(options(tmp_path / "run", "--max_steps", "3", *change))
    with pytest.raises(SystemExit, match="data.digest was"):
        train.main(options(tmp_path / "run", "--max_steps", "3", data=other))
    shutil.copytree(golden / "bin", tmp_path / "moved")  # the same data elsewhere is the same
    capsys.readouterr()
    train.main(options(tmp_path / "run", "--max_steps", "3", "optimization.lr=[0.01]", data=tmp_path / "moved"))
    assert "settings.optimization.lr [0.002] -> [0.01]" in capsys.readouterr().out
    saved = last(tmp_path / "run")
    assert saved["last_optimizer_state"]["param_groups"][0]["lr"] == pytest.approx(0.01 * 2 / 4)  # used, and recorded
    train.main(options(tmp_path / "run", "--max_steps", "4", "--precision", "bf16", "--accept_changes", "precision"))


def test_a_second_run_in_the_folder_is_refused(project, options, tmp_path):
    command = [sys.executable, "train.py", *options(tmp_path, "optimization.max_update=100000")]
    first = subprocess.Popen(command, cwd=project, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        for line in first.stdout:
            if line.startswith("step 2/"):
                break
        second = subprocess.run(command, cwd=project, capture_output=True, text=True)
        assert second.returncode == 2 and f"the run of process {first.pid}" in second.stderr, second.stderr
    finally:
        first.kill()
        first.communicate()
