"""The shell scripts and validate.py, as users start them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parents[1]
SMALL = ["model.transformer.encoder={embed_dim: 32, ffn_embed_dim: 64, layers: 2, attention_heads: 2}"]
SMALL += ["model.average_top_k_layers=2", "dataset.num_workers=0", "lr_scheduler.warmup_updates=1"]


def shell(script, *arguments):
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "etp_running_flag": "true",
    }
    command = ["bash", str(PROJECT / "test" / script), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def test_full_then_evaluation(corpus, tmp_path):
    output = tmp_path / "out put"
    flags = [f"--data_path={corpus}", "--device=cpu", f"--output_dir={output}"]
    done = shell("train_full_1p.sh", *flags, "--max_steps=3", "--", *SMALL)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Final Performance sequences/sec : " in done.stdout
    assert "Final Performance images/sec : " in done.stdout
    assert done.stdout.count("starting: ") == 1 and "Warning" not in done.stdout + done.stderr  # one line; and quiet
    assert "Status = OK" in (output / "Data2vec_for_PyTorch_bs1280_1p_acc.log").read_text()
    checkpoint = output / "checkpoints" / "checkpoint_best.pt"
    flags = [f"--data_path={corpus}", "--device=cpu", f"--output_dir={tmp_path / 'eval'}"]
    done = shell("train_eval_1p.sh", *flags, f"--checkpoint_path={checkpoint}", "--", *SMALL)
    assert done.returncode == 0, done.stdout + done.stderr
    assert '"valid_num_updates": "3"' in done.stdout
    trained = (output / "Data2vec_for_PyTorch_bs1280_1p_acc.log").read_text()
    best = next(line for line in trained.splitlines() if line.startswith("ValidBestLoss")).split()[-1]
    evaluated = (tmp_path / "eval" / "Data2vec_for_PyTorch_eval_bs1280_1p_acc.log").read_text()
    assert f"ActualLoss = {best}" in evaluated


@pytest.mark.parametrize("script", ["train_full_8p.sh", "train_performance_1p.sh", "train_performance_8p.sh"])
def test_other_scripts_say_what_they_run(corpus, script, tmp_path):
    flags = [f"--data_path={corpus}", "--device=cpu", f"--output_dir={tmp_path}", "--dry_run"]
    done = shell(script, *flags)
    assert done.returncode == 0, done.stderr
    ranks = 8 if "8p" in script else 1
    assert f"distributed_world_size={ranks}" in done.stdout
    assert ("checkpoint.no_save=true" in done.stdout) == ("performance" in script)


def test_scripts_take_pictures(tmp_path):
    flags = [f"--data_path={tmp_path}", "--device=cpu", f"--output_dir={tmp_path}", "--dry_run"]
    flags += ["--config_dir=configs/vision/pretraining", "--config_name=base_imagenet"]
    done = shell("train_full_8p.sh", *flags)
    assert done.returncode == 0, done.stderr
    assert "configs/vision/pretraining --config-name base_imagenet" in done.stdout
    assert "max_update" not in done.stdout  # the configuration's own


def test_fine_tuning_script(tmp_path):
    (tmp_path / "model.pt").touch()
    flags = [f"--data_path={tmp_path}", f"--pretrained_path={tmp_path}/model.pt", f"--corpus_path={tmp_path}"]
    more = ["--device=cpu", f"--output_dir={tmp_path}", "--batch_size=8", "--epochs=3", "--dry_run"]
    done = shell("finetune_full_1p.sh", *flags, *more, "--", "task.columns=[a,b]")
    assert done.returncode == 0, done.stderr
    wanted = ["finetune.py", f"task.vocab_bpe={tmp_path}/vocab.bpe", "dataset.batch_size=8", "optimization.max_epoch=3"]
    assert all(word in done.stdout for word in (*wanted, f"finetune_from_model={tmp_path}/model.pt", "task.columns="))
    assert "--pretrained_path is required" in shell("finetune_full_1p.sh", flags[0]).stderr


def test_script_refusals(tmp_path):
    assert "--data_path is required" in shell("train_full_1p.sh").stderr
    failed = shell("train_full_1p.sh", f"--data_path={tmp_path}", "--device=cpu", f"--output_dir={tmp_path / 'o'}")
    assert failed.returncode == 2 and "dict.txt" in failed.stderr
    assert "Status = FAILED" in next((tmp_path / "o").glob("*_acc.log")).read_text()
