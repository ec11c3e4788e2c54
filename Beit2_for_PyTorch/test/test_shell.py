"""The test/*.sh scripts: what they start, and one whole run."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import beit2

PROJECT = Path(__file__).resolve().parents[1]


def shell(script, *flags, cwd=PROJECT, **environment):
    command = ["bash", str(PROJECT / script), *flags]
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # the scripts call python3
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PATH": path} | environment
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment, timeout=900)


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        ("test/train_full_1p.sh", "run_beitv2_pretraining.py"),
        ("test/train_full_8p.sh", "--nproc_per_node 8"),
        ("test/train_performance_1p.sh", "--random_tokenizer"),
        ("test/train_performance_8p.sh", "--case_kind perf"),
        ("test/train_eval_1p.sh", "run_class_finetuning.py"),
        ("pretraining.sh", "beit_huge_5B_cls_pt --parallel fsdp --activation_checkpointing"),
    ],
)
def test_every_script_starts_its_program(pictures, script, expected, tmp_path):
    flags = [f"--data_path={pictures}", f"--output_dir={tmp_path}", "--dry_run"]
    if "eval" in script:
        flags.append(f"--ckpt_path={pictures}")
    done = shell(script, *flags)
    assert done.returncode == 0, done.stderr
    assert expected in done.stdout and str(pictures) in done.stdout


def test_every_flag_of_every_script_reaches_its_program_or_is_refused(pictures, tmp_path):
    """Values with blanks and a quote, as a shell may split; those of the launcher itself are tested in common/."""
    values = {"batch_size": "7", "epochs": "9", "max_steps": "11", "precision": "bf16", "device": "cpu"}
    values |= {
        "output_dir": f"{tmp_path}/o u't",
        "log_dir": f"{tmp_path}/l o'g",
        "tokenizer_weight": f"{tmp_path}/t o'k",
    }
    values |= {
        "data_path": f"{tmp_path}/d a't",
        "ckpt_path": f"{tmp_path}/c k'p",
        "model": "m o",
        "tokenizer_model": "t m",
    }
    for name in ("data_path", "ckpt_path"):
        Path(values[name]).mkdir()
    for script in ("pretraining.sh", *sorted(f"test/{path.name}" for path in (PROJECT / "test").glob("train_*_1p.sh"))):
        usage = shell(script, "--help").stdout
        known = {name for name in values if f"--{name}=" in usage}
        assert set(values) - known <= {"tokenizer_weight", "tokenizer_model", "model"}, script
        done = shell(script, *(f"--{name}={values[name]}" for name in known), "--dry_run")
        assert done.returncode == 0, done.stderr
        words = shlex.split(done.stdout.replace("\\\n", " "), comments=True)
        for name in known:
            assert any(values[name] in word for word in words), (script, name, done.stdout)
        for name in set(values) - known:
            assert "unknown flag" in (refused := shell(script, f"--{name}=x")).stderr and refused.returncode == 2


def test_an_evaluation_does_not_go_on_from_the_pretraining_in_the_default_folder(pictures):
    flags = [f"--data_path={pictures}", f"--ckpt_path={pictures}", "--device_id=3", "--dry_run"]
    done = shell("test/train_eval_1p.sh", *flags)
    assert f"--output_dir {PROJECT}/test/output/3/finetuning " in done.stdout, done.stderr
    done = shell("test/train_eval_1p.sh", *flags, "--output_dir=/tmp")
    assert "--output_dir /tmp " in done.stdout


def test_a_whole_run_from_the_test_folder(pictures, tmp_path):
    done = shell(
        "test/train_performance_1p.sh", f"--data_path={pictures / 'train'}", "--batch_size", "4", "--max_steps=2",
        "--model=beit_tiny_patch16_224_8k_vocab", "--tokenizer_model=vqkd_encoder_tiny_decoder_1x192x3_clip",
        "--device=cpu", f"--output_dir={tmp_path / 'out put'}", "--", "--num_workers", "0", "--input_size", "32",
        "--second_input_size", "32", "--num_mask_patches", "2", "--codebook_size", "16",
        cwd=PROJECT / "test",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    result = (tmp_path / "out put/Beit2_for_PyTorch_bs4_1p_perf.log").read_text()
    assert "Status = OK" in result and "ActualFPS" in result
    assert not list((tmp_path / "out put").glob("*.pth"))
    assert done.stdout.count("starting: ") == 1 and "Warning" not in done.stdout + done.stderr  # one line; and quiet


@pytest.fixture(scope="module")
def tiny(pictures, tmp_path_factory):
    """Flags for the scripts, and Python options behind --, that make a pretraining run take seconds."""
    name = "vqkd_encoder_tiny_decoder_1x192x3_clip"
    weights = tmp_path_factory.mktemp("tiny") / "tokenizer.pth"
    tokenizer = beit2.create_tokenizer(name, img_size=32, n_code=16, code_dim=8)
    torch.save({"model": tokenizer.state_dict()}, weights)
    flags = [f"--data_path={pictures / 'train'}", f"--tokenizer_weight={weights}", "--batch_size=8", "--device=cpu"]
    sizes = ["--input_size", "32", "--second_input_size", "32", "--num_mask_patches", "2", "--codebook_size", "16"]
    sizes += ["--codebook_dim", "8", "--tokenizer_model", name, "--model", "beit_tiny_patch16_224_8k_vocab_cls_pt"]
    return flags, [*sizes, "--warmup_epochs", "0", "--num_workers", "0", "--save_ckpt_freq", "1"]


def result(folder, name):
    lines = (folder / f"{name}.log").read_text().splitlines()
    return dict(line.split(" = ", 1) for line in lines if " = " in line)


def test_pretraining_and_its_accuracy(pictures, tiny, tmp_path):
    """train_full_1p.sh, then train_eval_1p.sh from its checkpoint."""
    flags, options = tiny
    output = tmp_path / "full"
    done = shell("test/train_full_1p.sh", *flags, "--epochs=1", f"--output_dir={output}", "--", *options)
    assert done.returncode == 0, done.stdout + done.stderr
    assert result(output, "Beit2_for_PyTorch_bs8_1p_acc")["Status"] == "OK"
    assert "Final Performance images/sec : " in done.stdout and "Final Train Accuracy : " in done.stdout

    checkpoint = output / "checkpoint-0.pth"
    done = shell(
        "test/train_eval_1p.sh", f"--data_path={pictures}", f"--ckpt_path={checkpoint}", "--device=cpu", "--epochs=1",
        "--batch_size=8", "--model=beit_tiny_patch16_224", f"--output_dir={tmp_path / 'eval'}",
        "--", "--input_size", "32", "--num_workers", "0",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "new in this model: fc_norm.weight, fc_norm.bias, head.weight, head.bias" in done.stdout
    values = result(tmp_path / "eval", "Beit2_for_PyTorch_bs8_1p_acc")
    assert values["Status"] == "OK" and 0 <= float(values["TrainAccuracy"]) <= 100


def test_pretraining_sh_shards_over_its_ranks(tiny, tmp_path):
    flags, options = tiny
    run = [*flags, "--nproc=2", "--epochs=1", f"--output_dir={tmp_path}", f"--log_dir={tmp_path / 'events'}"]
    done = shell("pretraining.sh", *run, "--", *options)
    assert done.returncode == 0, done.stdout + done.stderr
    assert result(tmp_path, "Beit2_for_PyTorch_bs8_2p_acc")["Status"] == "OK"
    assert (tmp_path / "checkpoint-sharded/.metadata").exists() and (tmp_path / "checkpoint-0.pth").exists()
    assert list((tmp_path / "events").glob("events.*")) and not (tmp_path / "tensorboard").exists()


def test_a_failed_run_keeps_its_exit_code(pictures, tmp_path):
    flags = (f"--data_path={pictures / 'train'}", "--device=cpu", f"--output_dir={tmp_path}", "--model=beit_typo")
    done = shell("test/train_performance_1p.sh", *flags)
    assert done.returncode == 2
    assert "--model beit_typo: unknown" in done.stderr
    assert "Status = FAILED" in (tmp_path / "Beit2_for_PyTorch_bs128_1p_perf.log").read_text()
