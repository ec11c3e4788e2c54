"""The project's test/*.sh, run as a user would on a machine with no accelerator."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from common.run import result_file

PROJECT = Path(__file__).resolve().parents[1]
TINY = ["model.name=vit_demo", "model.img_size=16", "data.num_workers=0", "optimizer.warmup_epochs=0"]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("two classes")
    for split, count in (("train", 24), ("val", 3)):
        for name, colour in (("blue", (0, 0, 200)), ("red", (200, 0, 0))):
            (root / split / name).mkdir(parents=True)
            for index in range(count):
                Image.new("RGB", (20, 20), colour).save(root / split / name / f"{index}.png")
    return root


def bash(script: str, *flags: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    environment.pop("RANK", None)
    command = ["bash", f"test/{script}", "--device=cpu", *flags]
    return subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, env=environment)


def test_eight_ranks_on_a_cpu_finish_with_one_log_each(pictures, tmp_path):
    flags = [f"--data_path={pictures}", f"--output_dir={tmp_path / 'my output'}", "--batch_size=2", "--epochs=1"]
    process = bash("train_full_8p.sh", *flags, "--", *TINY)
    assert process.returncode == 0, process.stderr
    result = result_file.read(tmp_path / "my output" / "ViT_for_PyTorch_bs2_8p_acc.log")
    assert result["Status"] == "OK" and result["RankSize"] == "8" and result["EvalCount"] == "6"
    logs = sorted(path.name for path in (tmp_path / "my output").glob("train_[0-9].log"))
    assert logs == [f"train_{rank}.log" for rank in range(8)]
    assert "E2E Training Duration sec" in process.stdout
    assert process.stdout.count("starting: ") == 1 and "Warning" not in process.stdout + process.stderr


def test_performance_run_then_evaluation_of_a_checkpoint(pictures, tmp_path):
    flags = [f"--data_path={pictures}", f"--output_dir={tmp_path}", "--batch_size=4"]
    process = bash("train_performance_1p.sh", *flags, "--max_steps=14", "--", *TINY)
    assert process.returncode == 0, process.stderr
    result = result_file.read(tmp_path / "ViT_for_PyTorch_bs4_1p_perf.log")
    assert float(result["ActualFPS"]) > 0 and "FPSNote" not in result and "TrainAccuracy" not in result

    weights = tmp_path / "checkpoints" / "checkpoint-14.pt"
    evaluation = [f"--data_path={pictures}", f"--output_dir={tmp_path / 'eval'}", f"--ckpt_path={weights}"]
    process = bash("train_eval_1p.sh", *evaluation, "--", *TINY)
    assert process.returncode == 0, process.stderr
    assert "Top1 Accuracy = {'Top1 Accuracy':" in process.stdout and "of 6)" in process.stdout


def test_a_failing_training_is_a_failing_script(pictures, tmp_path):
    process = bash("train_full_1p.sh", f"--data_path={pictures}", f"--output_dir={tmp_path}", "--batch_size=999")
    assert process.returncode == 2
    assert "fewer than one global batch" in process.stderr
    assert result_file.read(tmp_path / "ViT_for_PyTorch_bs999_1p_acc.log")["Status"] == "FAILED"


@pytest.mark.parametrize(
    "script",
    ["train_full_1p.sh", "train_full_8p.sh", "train_performance_1p.sh", "train_performance_8p.sh", "train_eval_1p.sh"],
)
def test_every_script_asks_for_its_data_and_knows_its_flags(script):
    assert bash(script).returncode == 2 and "--data_path is required" in bash(script).stderr
    assert "did you mean --data_path?" in bash(script, "--data_pth=x").stderr
