"""Hugging Face folders, there and back; the probe."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch

PROJECT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(PROJECT))


@pytest.fixture(scope="module")
def folder(golden, tmp_path_factory):
    import convert_checkpoint

    folder = tmp_path_factory.mktemp("hf") / "model"
    convert_checkpoint.main([str(golden / "checkpoint_tiny.pt"), str(folder), "--teacher"])
    return folder


def test_huggingface_computes_the_same(golden, folder):
    from transformers import Data2VecTextModel

    import convert_checkpoint

    theirs = Data2VecTextModel.from_pretrained(folder, add_pooling_layer=False).eval()
    path = golden / "checkpoint_tiny.pt"
    ours = convert_checkpoint.text_encoder(convert_checkpoint.load_pretrained(path), True, path).eval()
    tokens = torch.tensor([[0, 5, 9, 44, 30, 2], [0, 7, 8, 2, 1, 1]])
    with torch.no_grad():
        expected = theirs(tokens, attention_mask=tokens.ne(1)).last_hidden_state
        result = ours(tokens)
    real = tokens.ne(1)
    torch.testing.assert_close(result[real], expected[real], rtol=1e-5, atol=1e-5)


def test_folder_to_checkpoint(folder, golden, tmp_path):
    import convert_checkpoint
    from common import checkpoint_file

    convert_checkpoint.main([str(folder), str(tmp_path / "back.pt")])
    back = checkpoint_file.load(tmp_path / "back.pt")["model"]
    teacher = torch.load(golden / "checkpoint_tiny.pt", weights_only=True)["model"]["encoder._ema"]
    assert back.keys() == {f"encoder.sentence_encoder.{name}" for name in teacher}
    for name, value in teacher.items():
        assert torch.equal(back[f"encoder.sentence_encoder.{name}"], value)


def test_training_starts_from_a_folder(folder, golden, model_info):
    from data2vec import build_model
    from data2vec.weights.huggingface import load_huggingface
    from data2vec.weights.pretrained import load_weights

    model = build_model(model_info["base"]["cfg_model"], 169)
    head = model.encoder.regression_head[0].weight.clone()
    load_weights(model, load_huggingface(folder), folder)
    teacher = torch.load(golden / "checkpoint_tiny.pt", weights_only=True)["model"]["encoder._ema"]
    assert torch.equal(model.encoder.sentence_encoder.layers[2].fc1.weight, teacher["layers.2.fc1.weight"])
    assert torch.equal(model.encoder.regression_head[0].weight, head)


def test_conversion_refusals(folder, golden, tmp_path, capsys):
    import convert_checkpoint

    torch.save({"cfg": {"model": {"_name": "roberta"}}, "model": {}}, tmp_path / "roberta.pt")
    torch.save({"cfg": None, "model": {}}, tmp_path / "old.pt")
    shutil.copytree(folder, tmp_path / "relu")
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "relu" / "config.json").write_text(json.dumps({**config, "hidden_act": "relu"}))
    for arguments, words in (
        ([tmp_path / "roberta.pt", tmp_path / "y"], "holds a model of roberta"),
        ([tmp_path / "old.pt", tmp_path / "y"], "no pretraining checkpoint"),
        ([tmp_path / "relu", tmp_path / "x.pt"], "hidden_act=relu"),
        ([golden / "checkpoint_tiny.pt", folder], "not overwritten"),
        ([tmp_path, tmp_path / "x.pt"], "not a Data2VecTextModel folder"),
        ([tmp_path / "none.pt", tmp_path / "y"], "no such checkpoint"),
    ):
        with pytest.raises(SystemExit):
            convert_checkpoint.main([str(a) for a in arguments])
        assert words in capsys.readouterr().err


def test_probes_and_retrieval_measure_what_they_say():
    from data2vec.classifiers import linear_probe, logistic_probe, nearest_neighbour, retrieval

    generator = torch.Generator().manual_seed(0)
    y = torch.randint(5, (600,), generator=generator) + 10
    x = torch.nn.functional.one_hot(y - 10, 5).float() @ torch.randn(5, 16, generator=generator)
    noise = torch.randn(600, 16, generator=generator)
    for probe in (linear_probe, logistic_probe, lambda *split: (nearest_neighbour(*split), 20)):
        good, commonest = probe(x[:400], y[:400], x[400:], y[400:])
        bad, _ = probe(noise[:400], y[:400], noise[400:], y[400:])
        assert good > 99 and bad < 40 and 10 < commonest < 35
    assert retrieval(noise, noise + 0.1) == 100 and retrieval(noise, noise.flip(0)) < 2


def test_count_table_knows_the_neighbours_and_nothing_more():
    import numpy as np

    from data2vec.count_table import CountTable

    corpus = np.array([10, 1, 20] * 4 + [11, 2, 20] * 4 + [10, 3, 21] * 2 + [11, 3, 21])  # left, token, right
    table = CountTable(corpus, np.array([1, 2, 3]))
    assert [table.guess(10, 20), table.guess(11, 20), table.guess(10, 21)] == [0, 1, 2]
    assert table.guess(10, None) == 0 and table.guess(None, 21) == 2 and table.guess(None, None) == 0
    assert table.guess(11, 21) == 2  # seen once only: from both neighbours apart


def test_neighbours_that_are_hidden_or_special_are_not_visible():
    from data2vec.text_probe import NOT_VISIBLE, _neighbours

    source = torch.tensor([[0, 7, 99, 8, 9]])  # <s>, ids, one masked
    assert _neighbours(source, -1, 99, 4).tolist() == [NOT_VISIBLE, NOT_VISIBLE, 7, NOT_VISIBLE, 8]
    assert _neighbours(source, 1, 99, 4).tolist() == [7, NOT_VISIBLE, 8, 9, NOT_VISIBLE]


def test_probe_runs_on_a_checkpoint(golden, capsys):
    import probe

    arguments = ["--config-dir", str(PROJECT / "test"), "--config-name", "tiny", "--device", "cpu"]
    checkpoint = golden / "checkpoint_tiny.pt"
    results = probe.main([*arguments, f"task.data={golden / 'bin'}", f"common_eval.path={checkpoint}"])
    assert set(results) == {"untrained", "checkpoint"}
    assert "cloze retrieval" in capsys.readouterr().out
    assert 0 <= results["checkpoint"]["linear probe"] <= 100
    assert results["checkpoint"]["count table"] == results["untrained"]["count table"] > 0
    assert results["checkpoint"]["teacher's probe"] != results["untrained"]["teacher's probe"]
