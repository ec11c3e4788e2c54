"""A resumed run is of the same data, recipe and tokenizer; what may change takes effect; a preempted one goes on."""

import json
import os
import re
import shutil
import signal

import pytest
import torch
from small_models import OPTIONS

import beit2
import run_beitv2_pretraining
import run_class_finetuning
from common.errors import Preempted, UsageError


@pytest.fixture
def run(pictures, tokenizer_file, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(pictures / "train", data)

    def run(*extra):
        return run_beitv2_pretraining.main([
            *OPTIONS, "--model", "beit_test_cls_pt", "--data_path", str(data), "--tokenizer_weight",
            str(tokenizer_file), "--epochs", "2", "--output_dir", str(tmp_path / "out"), *extra,
        ])  # fmt: skip

    return run


def lines(folder):
    texts = (folder / "metrics.jsonl").read_text().splitlines()
    return {line["step"]: line for line in map(json.loads, texts) if line["kind"] == "train"}


def test_another_run_is_refused_and_can_be_accepted(run, tmp_path):
    run("--max_steps", "2")
    other = tmp_path / "other.pth"
    torch.manual_seed(9)
    tokenizer = beit2.create_tokenizer("vqkd_test_clip", img_size=32, n_code=32, code_dim=8, decoder_out_dim=16)
    torch.save({"model": tokenizer.state_dict()}, other)
    for extra, name in (
        (("--seed", "3"), "recipe.seed was 0, is now 3"),
        (("--num_mask_patches", "5"), "recipe.num_mask_patches was 6, is now 5"),
        (("--opt_betas", "0.9", "0.98"), "recipe.opt_betas was None, is now"),
        (("--precision", "bf16"), "precision was 'fp32', is now 'bf16'"),
        (("--tokenizer_weight", str(other)), "tokenizer was"),
    ):
        with pytest.raises(UsageError) as caught:
            run("--max_steps", "3", *extra)
        assert re.search(name, caught.value.message), caught.value.message
        assert "--accept_changes" in caught.value.message
    (tmp_path / "data/red/more.jpg").write_bytes((tmp_path / "data/red/0.jpg").read_bytes())
    with pytest.raises(UsageError, match="data.count was 16, is now 17"):
        run("--max_steps", "3")
    run("--max_steps", "3", "--accept_changes", "data")
    assert list(lines(tmp_path / "out")) == [1, 2, 3]


def test_a_new_rate_takes_effect_and_is_told(run, tmp_path, capsys):
    run("--max_steps", "5")
    run("--lr", "1e-4", "--weight_decay", "0.01")
    assert "recipe.lr 0.0005 -> 0.0001" in capsys.readouterr().out
    rates = [line["lr"] for line in lines(tmp_path / "out").values()]
    assert rates[4] > 1e-4 >= max(rates[5:]) > 0
    assert lines(tmp_path / "out")[8]["weight_decay"] == pytest.approx(0.01)


def test_classes_of_another_name_are_another_run(pictures, tmp_path):
    shutil.copytree(pictures / "train", tmp_path / "data")
    line = (
        "--model beit_test_classifier --input_size 32 --batch_size 4 --num_workers 0 --device cpu --aa none --reprob 0"
    )
    line += f" --epochs 1 --warmup_epochs 0 --data_path {tmp_path}/data --output_dir {tmp_path}/out"
    run_class_finetuning.main([*line.split(), "--max_steps", "1"])
    (tmp_path / "data/red").rename(tmp_path / "data/zebra")
    with pytest.raises(UsageError, match=r"data.classes was \['blue', 'red'\], is now \['blue', 'zebra'\]"):
        run_class_finetuning.main(line.split())


def test_a_preempted_run_saves_and_goes_on_as_if_nothing_had_been(run, tmp_path, monkeypatch):
    run()
    whole = lines(tmp_path / "out")
    shutil.rmtree(tmp_path / "out")
    import beit2.training.run as loop

    real = loop.gradient_step

    def asked(*arguments):
        if arguments[-1] == 3:
            os.kill(os.getpid(), signal.SIGUSR1)
        return real(*arguments)

    monkeypatch.setattr(loop, "gradient_step", asked)
    with pytest.raises(Preempted):
        run()
    monkeypatch.undo()
    assert "Status = PREEMPTED" in next((tmp_path / "out").glob("*_acc.log")).read_text()
    assert max(lines(tmp_path / "out")) < 6
    run()
    for step, line in lines(tmp_path / "out").items():
        assert line["loss"] == whole[step]["loss"] and line["grad_norm"] == whole[step]["grad_norm"]
    assert len(whole) == 8
