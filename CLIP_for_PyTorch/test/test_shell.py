"""The shell scripts: the reference's names, the command they build, and one real two-rank run through them."""

import json
import os
import subprocess
from pathlib import Path

import pytest
from clip_sample import write_coco_zips

import run_clip
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


def losses(output: Path) -> list[float]:
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if line["kind"] == "train"]


def test_two_ranks_train_as_one_and_evaluate_as_one(coco_zips, model_without_dropout, tmp_path):
    """20 steps of the same global batch through the 8p script on two processes and in this one."""
    output = tmp_path / "out put"
    data, model = f"--data_path={coco_zips}", f"--model_path={model_without_dropout}"
    flags = [data, model, "--device=cpu", "--precision=fp32", "--workers", "0", "--batch_size=4"]
    steps = ["--nproc=2", "--max_steps=20", f"--output_dir={output}"]
    done = bash("train_clip_performance_8p.sh", *flags, *steps, "--", "--log_every", "1", cwd=TEST)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    stored = read_result(output / "CLIP_for_PyTorch_bs4_2p_perf.log")
    assert stored["Status"] == "OK" and stored["RankSize"] == "2" and float(stored["ActualFPS"]) > 0
    assert (output / "train_0.log").exists() and (output / "train_1.log").exists()
    assert "------------------ Final result ------------------" in done.stdout

    alone = ["--output_dir", str(tmp_path / "one"), "--device", "cpu", "--max_steps", "20", "--log_every", "1"]
    alone += [
        "--model_name_or_path",
        str(model_without_dropout),
        "--data_dir",
        str(coco_zips),
        "--do_train",
        "--do_eval",
    ]
    alone += ["--per_device_train_batch_size", "8", "--per_device_eval_batch_size", "4", "--save_every", "0"]
    alone += ["--learning_rate", "5e-5", "--weight_decay", "0.1", "--dataloader_drop_last"]
    one = run_clip.main(alone)
    assert losses(output) == pytest.approx(losses(tmp_path / "one"), abs=1e-5)
    assert float(stored["EvalLoss"]) == pytest.approx(one["EvalLoss"], abs=1e-5)


def test_the_readme_commands_train_on_zips_and_evaluate_what_they_trained(tiny_model, tmp_path):
    """As the README has them: the recipe of the published table, fp16, batch 64, 3 epochs; only results go aside."""
    write_coco_zips(tmp_path / "coco", {"train": 16, "val": 8}, captions_each=8)
    data, trained = f"--data_path={tmp_path / 'coco'}", tmp_path / "trained"
    done = bash("train_clip_full_1p.sh", data, f"--model_path={tiny_model}", f"--output_dir={trained}")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    stored = read_result(trained / "CLIP_for_PyTorch_bs64_1p_acc.log")
    assert stored["Status"] == "OK" and len(losses(trained)) >= 1
    assert json.loads((trained / "trainer_state.json").read_text())["global_step"] == 6

    done = bash("train_eval_1p.sh", data, f"--ckpt_path={trained}", f"--output_dir={tmp_path / 'eval'}")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert read_result(tmp_path / "eval/CLIP_for_PyTorch_eval_bs64_1p_acc.log")["BatchSize"] == "64"
    evaluated = json.loads((tmp_path / "eval/eval_results.json").read_text())
    assert evaluated["eval_samples"] == 64
    assert evaluated["eval_loss"] == pytest.approx(float(stored["EvalLoss"]), abs=1e-3)
