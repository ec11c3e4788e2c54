"""--compile: whole graphs, few of them, the losses of the eager blocks; said in words where it cannot work."""

import json
import re
from types import SimpleNamespace

import pytest
import torch
from small_models import OPTIONS
from torch._dynamo.utils import counters

import run_beitv2_pretraining
import run_class_finetuning
import run_vqkd_training
from beit2.model.teachers import build_teacher
from common.errors import UsageError
from common.model import compilation


@pytest.fixture
def graphs():
    """How many graphs were made since the test began; dynamo's own breaks are an error (fullgraph)."""
    torch._dynamo.reset()
    counters.clear()
    yield lambda: counters["stats"]["unique_graphs"]
    assert not counters["graph_break"]
    torch._dynamo.reset()


def losses(folder):
    lines = [json.loads(text) for text in (folder / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines if line["kind"] == "train"}


def pretrain(pictures, tokenizer_file, output_dir, *extra):
    return run_beitv2_pretraining.main([
        *OPTIONS, "--model", "beit_test_cls_pt", "--data_path", str(pictures / "train"), "--tokenizer_weight",
        str(tokenizer_file), "--epochs", "13", "--drop_path", "0.2", "--head_layers", "2", "--save_ckpt_freq", "99",
        "--output_dir", str(output_dir), *extra,
    ])  # fmt: skip


def test_fifty_steps_of_pretraining_are_the_eager_ones(pictures, tokenizer_file, tmp_path, monkeypatch, capsys, graphs):
    """With dropped paths, a monitor and a resume; what inductor makes of the same graphs is the next test's."""
    monkeypatch.setattr(compilation, "BACKEND", "aot_eager")
    pretrain(pictures, tokenizer_file, tmp_path / "eager")
    assert graphs() == 0 and "first step" not in capsys.readouterr().out
    watched = ("--compile", "--monitor_every", "5")
    pretrain(pictures, tokenizer_file, tmp_path / "compiled", *watched, "--max_steps", "30")
    pretrain(pictures, tokenizer_file, tmp_path / "compiled", *watched)
    assert graphs() == 3  # all rows, those of the masked patches and CLS, those without CLS: two recompilations
    assert len(re.findall(r"first step: \d+\.\d s, in which torch.compile", capsys.readouterr().out)) == 2
    eager, compiled = losses(tmp_path / "eager"), losses(tmp_path / "compiled")
    assert list(compiled) == list(eager) == list(range(1, 53))
    for step, loss in eager.items():
        assert compiled[step] == pytest.approx(loss, rel=1e-4), step


def test_fine_tuning_by_inductor(pictures, tmp_path, graphs):
    run = "--model beit_test_classifier --input_size 32 --epochs 13 --batch_size 4 --warmup_epochs 1 --num_workers 0 "
    run += "--device cpu --log_every 1 --drop_path 0.2 --aa none --reprob 0 --save_ckpt_freq 99 --model_ema"
    data = ["--data_path", str(pictures / "train"), "--eval_data_path", str(pictures / "val")]
    for name, extra in (("eager", []), ("compiled", ["--compile"])):
        run_class_finetuning.main([*run.split(), *data, *extra, "--output_dir", str(tmp_path / name)])
    assert graphs() == 1
    eager, compiled = losses(tmp_path / "eager"), losses(tmp_path / "compiled")
    assert list(compiled) == list(range(1, 53))
    for step, loss in eager.items():
        assert compiled[step] == pytest.approx(loss, rel=1e-3, abs=1e-4), step


def test_a_tokenizer_s_encoder_and_decoder_share_a_graph(pictures, tmp_path, monkeypatch, graphs):
    monkeypatch.setattr(compilation, "BACKEND", "aot_eager")
    torch.manual_seed(0)
    teacher = build_teacher({"width": 64, "layers": 1, "heads": 1, "output_dim": 12, "patch": 8, "res": 32})
    torch.save(teacher.state_dict(), tmp_path / "clip.pt")
    run = "--model vqkd_test_clip --input_size 32 --codebook_n_emd 32 --codebook_emd_dim 8 --epochs 1 --batch_size 4 "
    run += "--warmup_epochs 0 --num_workers 0 --device cpu --log_every 1"
    run = [*run.split(), "--data_path", str(pictures / "train"), "--teacher_weight", str(tmp_path / "clip.pt")]
    for name, extra in (("eager", []), ("compiled", ["--compile"])):
        run_vqkd_training.main([*run, *extra, "--output_dir", str(tmp_path / name)])
    assert graphs() == 1
    assert losses(tmp_path / "compiled") == pytest.approx(losses(tmp_path / "eager"), rel=1e-4)


def test_where_it_cannot_work(pictures, tokenizer_file, tmp_path, monkeypatch):
    with pytest.raises(UsageError, match="--compile: torch.compile on npu .*leave it out"):
        compilation.compiled(len, SimpleNamespace(type="npu"))
    with pytest.raises(UsageError, match="--compile: not with --parallel fsdp"):
        pretrain(pictures, tokenizer_file, tmp_path / "out", "--compile", "--fsdp")
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UsageError, match=r"a C\+\+ compiler \(g\+\+, clang\+\+, c\+\+\), there is none"):
        pretrain(pictures, tokenizer_file, tmp_path / "out", "--compile")
    assert not (tmp_path / "out/metrics.jsonl").exists()
