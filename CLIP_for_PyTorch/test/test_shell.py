"""The shell scripts: the reference's names, the command they build, and one real two-rank run through them."""

import json
import os
import subprocess
from pathlib import Path

import pytest

from common.result_file import read as read_result

TEST = Path(__file__).parent


def bash(script: str, *flags: str, cwd: Path = TEST.parent) -> subprocess.CompletedProcess:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = ["bash", str(TEST / script), *flags]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=500)


@pytest.mark.parametrize(
    "front, target, kind",
    [
        ("train_clip_full_1p.sh", "train_full_1p.sh", "acc"),
        ("train_clip_full_8p.sh", "train_full_8p.sh", "acc"),
        ("train_clip_performance_1p.sh", "train_performance_1p.sh", "perf"),
        ("train_clip_performance_8p.sh", "train_performance_8p.sh", "perf"),
    ],
)
def test_the_readme_names_start_the_same_command(front, target, kind, tmp_path):
    flags = [f"--data_path={tmp_path}", f"--model_path={tmp_path}", "--dry_run", f"--output_dir={tmp_path / 'out'}"]
    done = bash(front, *flags)
    assert done.returncode == 0, done.stderr
    assert done.stdout == bash(target, *flags).stdout
    assert "run_clip.py" in done.stdout and f"--case_kind {kind}" in done.stdout
    assert ("--nproc_per_node 8" in done.stdout) == ("8p" in front)
    assert ("--max_steps 1000" in done.stdout) == (kind == "perf")
    for option in ("--learning_rate 5e-5", "--weight_decay 0.1", "--warmup_steps 0", "--precision fp16"):
        assert option in done.stdout


def test_the_cluster_script_meets_at_node_0(tmp_path):
    flags = [f"--data_path={tmp_path}", f"--model_path={tmp_path}", "--dry_run", f"--output_dir={tmp_path / 'out'}"]
    nodes = ["--nnodes=2", "--node_rank=1", "--master_addr=10.0.0.1", "--master_port=29512"]
    done = bash("train_clip_cluster.sh", *flags, *nodes)
    assert done.returncode == 0, done.stderr
    for option in (
        "--nnodes 2",
        "--node_rank 1",
        "--master_addr 10.0.0.1",
        "--master_port 29512",
        "--nproc_per_node 8",
    ):
        assert option in done.stdout
    assert bash("train_clip_cluster.sh", *flags, "--nnodes=2").returncode == 2


def test_missing_and_misspelt_flags_are_named(tmp_path):
    done = bash("train_full_1p.sh", f"--data_path={tmp_path}")
    assert done.returncode == 2 and "--model_path is required" in done.stderr
    done = bash("train_full_1p.sh", "--modle_path=x")
    assert done.returncode == 2 and "did you mean --model_path" in done.stderr


def test_two_ranks_through_the_script_and_evaluation_of_what_they_trained(coco_zips, tiny_model, tmp_path):
    output = tmp_path / "out put"
    flags = ["--device=cpu", "--precision=fp32", "--workers", "0", "--batch_size=4", f"--output_dir={output}"]
    done = bash(
        "train_clip_performance_8p.sh",
        f"--data_path={coco_zips}",
        f"--model_path={tiny_model}",
        "--nproc=2",
        "--max_steps=3",
        *flags,
        cwd=TEST,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    stored = read_result(output / "CLIP_for_PyTorch_bs4_2p_perf.log")
    assert stored["Status"] == "OK" and stored["RankSize"] == "2"
    assert (output / "train_0.log").exists() and (output / "train_1.log").exists()
    assert "------------------ Final result ------------------" in done.stdout

    flags[-1] = f"--output_dir={tmp_path / 'eval'}"
    done = bash("train_eval_1p.sh", f"--data_path={coco_zips}", f"--ckpt_path={output}", *flags)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    evaluated = json.loads((tmp_path / "eval/eval_results.json").read_text())
    trained = json.loads((output / "eval_results.json").read_text())
    assert evaluated["eval_loss"] == pytest.approx(trained["eval_loss"], abs=1e-5)  # one rank or two
