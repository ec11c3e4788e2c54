"""--compile: whole graphs, few of them whatever the lengths, the losses of the eager blocks; refused in words."""

import importlib
import re
from types import SimpleNamespace

import pytest
import torch
from small_runs import TEST, lines, words
from torch._dynamo.utils import counters

from common.errors import UsageError
from common.model import compilation
from data2vec.compiled_blocks import compile_blocks
from data2vec.model.multi.block import Block, BlockConfig

DROPS = ["model.transformer.dropout=0.1", "model.transformer.attention_dropout=0.1"]
# name: entry, configuration, more options, backend, graphs: student and teacher have one each, and another where their
# last block works on some rows alone
RUNS = {
    "text": ("train", "tiny", [*DROPS, "model.transformer.checkpoint_activations=true"], "aot_eager", 4),
    "pictures": ("train", "tiny_vision", ["--precision", "bf16"], "eager", 4),
    "2.0, text": ("train", "tiny_multi", [], "eager", 2),
    "2.0, pictures": ("train", "tiny_multi_vision", ["model.checkpoint_activations=true"], "eager", 2),
    "fine-tuning": ("finetune", "demo", [], "eager", 2),
}


@pytest.fixture
def graphs(monkeypatch):
    """How many graphs were made since the test began; dynamo's own breaks are an error (fullgraph)."""
    monkeypatch.setenv("CPU_PATCHES_OFF", "cheap_dropout,wide_products")  # whose draws are not torch's
    torch._dynamo.reset()
    counters.clear()
    yield lambda: counters["stats"]["unique_graphs"]
    assert not counters["graph_break"]
    torch._dynamo.reset()


@pytest.fixture
def options(golden, bpe, sample_data):
    def of(name, output, *more):
        entry, config, own, *_ = RUNS[name]
        data = golden / "bin" if "text" in name else sample_data / "images"
        if entry == "finetune":
            data = golden / "questions"
            own = ["task.label_column=kind", "checkpoint.finetune_from_model=none", f"task.dict={bpe}/dict.txt"]
            own += [f"task.encoder_json={bpe}/encoder.json", f"task.vocab_bpe={bpe}/vocab.bpe"]
        place = TEST if entry == "train" else TEST.parent / "configs/text/finetuning"
        own = [*own, "--log_every", "1", "optimization.max_update=6", "dataset.num_workers=0", *more]
        # the lengths that --compile takes: draws depend on sizes
        return words(place, config, data, output, *own, "dataset.required_seq_len_multiple=64")

    return of


@pytest.mark.parametrize("name", RUNS)
def test_losses_are_the_eager_ones_in_few_graphs(name, options, tmp_path, monkeypatch, capsys, graphs):
    """With dropout, dropped paths and evaluations. By inductor: measured in docs/experiments_beit2_data2vec.md."""
    entry, _, _, backend, expected = RUNS[name]
    monkeypatch.setattr(compilation, "BACKEND", backend)
    train = importlib.import_module(entry).main
    train(options(name, tmp_path / "eager"))
    assert graphs() == 0 and "first step" not in capsys.readouterr().out
    train(options(name, tmp_path / "compiled", "--compile"))
    assert graphs() == expected
    assert len(re.findall(r"first step: \d+\.\d s, in which torch.compile", capsys.readouterr().out)) == 1
    eager, compiled = (lines(tmp_path / folder, "train") for folder in ("eager", "compiled"))
    assert [line["step"] for line in compiled] == [1, 2, 3, 4, 5, 6]
    close = 1e-2 if name == "pictures" else 1e-5  # bf16
    assert [line["loss"] for line in compiled] == pytest.approx([line["loss"] for line in eager], rel=close)


def test_a_single_row_makes_no_graph(monkeypatch, graphs):
    monkeypatch.setattr(compilation, "BACKEND", "eager")
    block = Block(BlockConfig(embed_dim=8, num_heads=2, encoder_dropout=0, attention_dropout=0, post_mlp_drop=0))
    alone = block(torch.ones(1, 5, 8), None)
    compile_blocks(block, torch.device("cpu"))
    assert torch.equal(block(torch.ones(1, 5, 8), None)[0], alone[0]) and graphs() == 0
    for rows, length in ((2, 5), (3, 4), (8, 8), (9, 7)):
        torch.testing.assert_close(block(torch.ones(rows, length, 8), None)[0][0, 0], alone[0][0, 0])
    assert graphs() == 1


def test_buckets_and_refusals(options, tmp_path, monkeypatch, capsys):
    with pytest.raises(UsageError, match="--compile: torch.compile on npu .*leave it out"):
        compile_blocks(torch.nn.Linear(1, 1), SimpleNamespace(type="npu"))
    import train
    import validate

    arguments = [text for text in options("text", tmp_path / "out", "--compile") if "required" not in text]
    with pytest.raises(SystemExit):
        validate.main([*arguments, "common_eval.path=x.pt"])
    assert "--compile: is of a training" in capsys.readouterr().err
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SystemExit):
        train.main(arguments)
    assert "a C++ compiler (g++, clang++, c++), there is none" in capsys.readouterr().err
    assert not (tmp_path / "out/metrics.jsonl").exists()
