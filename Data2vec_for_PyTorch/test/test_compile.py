"""--compile: whole graphs, few of them whatever the lengths, the losses of the eager blocks; refused in words."""

import json
import re
from pathlib import Path

import pytest
import torch
from torch._dynamo.utils import counters

from common.model import compilation

TEST = Path(__file__).parent
DROPS = ["model.transformer.dropout=0.1", "model.transformer.attention_dropout=0.1"]
# name: entry, configuration, more options, graphs: of student and teacher each, and where the last block works on some
# rows alone, of that, too
RUNS = {
    "text": ("train", "tiny", DROPS, 4),
    "text, checkpointed": ("train", "tiny", [*DROPS, "model.transformer.checkpoint_activations=true"], 4),
    "pictures": ("train", "tiny_vision", [], 4),
    "pictures in bf16": ("train", "tiny_vision", ["--precision", "bf16"], 4),
    "2.0, text": ("train", "tiny_multi", [], 2),
    "2.0, pictures": ("train", "tiny_multi_vision", [], 2),
    "fine-tuning": ("finetune", "demo", [], 2),
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
        entry, config, own, _ = RUNS[name]
        data = golden / "bin" if "text" in name else sample_data / "images"
        place = ["--config-dir", str(TEST)]
        if entry == "finetune":
            data, place = golden / "questions", ["task.label_column=kind", "checkpoint.finetune_from_model=none"]
            place += [f"task.{key}={bpe}/{key.replace('_', '.')}" for key in ("encoder_json", "vocab_bpe")]
            place += [f"task.dict={bpe}/dict.txt"]
        base = ["--config-name", config, f"task.data={data}", "--device", "cpu", "--log_every", "1"]
        base += ["dataset.disable_validation=true"] if entry == "train" else []
        base += ["dataset.required_seq_len_multiple=64"]  # as --compile has it: draws depend on sizes
        return [*place, *base, "--output_dir", str(output), *own, *more]

    return of


def losses(folder):
    lines = [json.loads(text) for text in (folder / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines if line["kind"] == "train"}


@pytest.mark.parametrize("name", RUNS)
def test_losses_are_the_eager_ones_in_few_graphs(name, options, tmp_path, monkeypatch, capsys, graphs):
    """With dropout, dropped paths and a resume; what inductor makes of such graphs: test_by_inductor."""
    monkeypatch.setattr(compilation, "BACKEND", "aot_eager")
    train = __import__(RUNS[name][0]).main
    train(options(name, tmp_path / "eager", "optimization.max_update=8"))
    assert graphs() == 0 and "first step" not in capsys.readouterr().out
    train(options(name, tmp_path / "compiled", "optimization.max_update=8", "--compile"))
    assert graphs() == RUNS[name][3]
    assert len(re.findall(r"first step: \d+\.\d s, in which torch.compile", capsys.readouterr().out)) == 1
    eager, compiled = losses(tmp_path / "eager"), losses(tmp_path / "compiled")
    assert list(compiled) == list(eager) == list(range(1, 9))
    for step, loss in eager.items():
        assert compiled[step] == pytest.approx(loss, rel=1e-2 if "bf16" in name else 1e-4), step
