"""Hugging Face folders, there and back; the probe."""

import json
import shutil
from pathlib import Path

import pytest
import torch

PROJECT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def folder(golden, tmp_path_factory):
    import convert_checkpoint

    folder = tmp_path_factory.mktemp("hf") / "model"
    convert_checkpoint.main([str(golden / "checkpoint_tiny.pt"), str(folder), "--teacher"])
    return folder


def test_huggingface_computes_the_same(golden, folder):
    from transformers import Data2VecTextModel

    from data2vec.weights.pretrained import load_pretrained, text_encoder

    theirs = Data2VecTextModel.from_pretrained(folder, add_pooling_layer=False).eval()
    path = golden / "checkpoint_tiny.pt"
    ours = text_encoder(load_pretrained(path), True, path).eval()
    tokens = torch.tensor([[0, 5, 9, 44, 30, 2], [0, 7, 8, 2, 1, 1]])
    with torch.no_grad():
        expected = theirs(tokens, attention_mask=tokens.ne(1)).last_hidden_state
        result = ours(tokens)
    real = tokens.ne(1)
    torch.testing.assert_close(result[real], expected[real], rtol=1e-5, atol=1e-5)


def test_the_folder_has_the_corpus_tokenizer(golden, model_info, tmp_path):
    """Equal ids, and equal outputs where dict.txt lists a piece as <unk>."""
    from transformers import AutoTokenizer, Data2VecTextModel

    import bpe_encode
    import convert_checkpoint
    import preprocess
    from data2vec import Dictionary, IndexedDataset, build_model

    words = ["To be, or not to be, that is the question:", "Whether 'tis nobler in the mind to suffer"]
    lines = [f"{a} {b}" for a in words for b in ("", "  twice", "HELLO", "naïve 👍")]
    (tmp_path / "train.txt").write_text("\n".join(lines * 40))
    (tmp_path / "valid.txt").write_text("\n".join([*lines, "quizzical zebra #42"]))
    files = ["--encoder-json", f"{tmp_path}/encoder.json", "--vocab-bpe", f"{tmp_path}/vocab.bpe"]
    texts = [f"{tmp_path}/{name}.txt" for name in ("train", "valid")]
    bpe = [f"{tmp_path}/{name}.bpe" for name in ("train", "valid")]
    bpe_encode.main(["--learn", "300", *files, "--inputs", *texts, "--outputs", *bpe])
    preprocess.main(["--only-source", "--trainpref", bpe[0], "--validpref", bpe[1], "--destdir", f"{tmp_path}/bin"])
    vocab = Dictionary.load(tmp_path / "bin/dict.txt")
    config = model_info["base"]["cfg_model"]
    model = build_model(config, len(vocab) + 1)
    torch.save({"cfg": {"model": {**config, "_name": "data2vec_text"}}, "model": model.state_dict()}, tmp_path / "a.pt")
    command = [f"{tmp_path}/a.pt", f"{tmp_path}/folder", *files, "--dict", f"{tmp_path}/bin/dict.txt"]
    convert_checkpoint.main(command)

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "folder")
    theirs = Data2VecTextModel.from_pretrained(tmp_path / "folder", add_pooling_layer=False).eval()
    corpus = IndexedDataset(tmp_path / "bin/valid")
    unknown = 0
    for i, line in enumerate((tmp_path / "valid.txt").read_text().splitlines()):
        expected = torch.cat([torch.tensor([0]), corpus[i]])  # the binarized line, <s> before it
        ids = tokenizer(line.strip(), return_tensors="pt")["input_ids"][0]
        known = ids < len(vocab) + 1
        assert torch.equal(ids[known], expected[known]) and (expected[~known] == vocab.unk()).all()
        unknown += int((~known).sum())
        with torch.no_grad():
            ours = model.encoder.sentence_encoder.eval()(expected[None])
            torch.testing.assert_close(theirs(ids[None]).last_hidden_state, ours, rtol=1e-4, atol=1e-5)
    assert unknown > 0 and tokenizer.mask_token_id == len(vocab)
    assert tokenizer.decode(tokenizer("To be, naïve 👍")["input_ids"], skip_special_tokens=True) == "To be, naïve 👍"

    convert_checkpoint.main([f"{tmp_path}/folder", f"{tmp_path}/back.pt"])
    back = torch.load(tmp_path / "back.pt", weights_only=True)["model"]
    name = "encoder.sentence_encoder.embed_tokens.weight"
    assert torch.equal(back[name], model.state_dict()[name])
    other = [*command[:1], f"{tmp_path}/other", *files, "--dict", str(golden / "bin/dict.txt")]
    with pytest.raises(SystemExit, match="it was trained with another dict.txt"):
        convert_checkpoint.main(other)


def test_without_a_tokenizer_none_is_made_up(folder):
    from transformers import AutoTokenizer

    with pytest.raises(Exception, match="(?i)tokenizer|backend"):
        AutoTokenizer.from_pretrained(folder)


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

    from data2vec.count_table import NOT_VISIBLE, CountTable

    corpus = np.array([10, 1, 20] * 4 + [11, 2, 20] * 4 + [10, 3, 21] * 2 + [11, 3, 21])  # left, token, right
    table = CountTable(corpus, np.array([1, 2, 3]))
    assert [table.guess(10, 20), table.guess(11, 20), table.guess(10, 21)] == [0, 1, 2]
    assert table.guess(10, NOT_VISIBLE) == 0 and table.guess(NOT_VISIBLE, 21) == 2
    assert table.guess(NOT_VISIBLE, NOT_VISIBLE) == 0
    assert table.guess(11, 21) == 2  # seen once only: from both neighbours apart
    never = 22  # in the dictionary, but not in the training text
    assert table.guess(never, 21) == 2 and table.guess(10, never) == 0 and table.guess(never, never) == 0


def test_table_of_four_neighbours_answers_where_it_has_seen_them_often_enough():
    import numpy as np

    from data2vec.count_table import LEAST_SEEN, NOT_VISIBLE, guess_of_four
    from data2vec.text_probe import counting_accuracy

    corpus = np.array([8, 10, 1, 20, 9] * 5 + [9, 10, 2, 20, 8] * 5 + [8, 10, 2, 20, 8] * (LEAST_SEEN - 1))
    asked = [[8, 10, 20, 9], [9, 10, 20, 8], [8, 10, 20, 8], [NOT_VISIBLE, 10, 20, 9], [7, 10, 20, 9]]
    assert guess_of_four(corpus, np.array([2, 1]), np.array(asked)).tolist() == [1, 0, -1, 1, -1]
    found = {"token": torch.tensor([1, 2, 2, 1, 5]), "around": torch.tensor(asked)}
    of_two, of_four = counting_accuracy(corpus, torch.tensor([2, 1]), found)  # the token 5 is not among the common
    assert (of_two, of_four) == (50, 100)


def test_neighbours_that_are_hidden_or_outside_the_block_are_not_visible():
    from data2vec.text_probe import NOT_VISIBLE, _neighbours

    source = torch.tensor([[0, 7, 99, 2, 9], [5, 6, 7, 8, 9]])  # <s>, ids, one of them masked and one </s>
    hidden = NOT_VISIBLE
    found = _neighbours(source, (99, 0, 1)).view(2, 5, 4)  # at -2, -1, 1, 2
    assert found[0, 2].tolist() == [hidden, 7, 2, 9] and found[0, 4].tolist() == [hidden, 2, hidden, hidden]
    assert found[1, 0].tolist() == [hidden, hidden, 6, 7] and found[1, 2].tolist() == [5, 6, 8, 9]


def test_probes_ask_of_two_masked_tokens_at_least_and_may_find_none_to_guess():
    from types import SimpleNamespace

    from common.errors import UsageError
    from data2vec import text_probe
    from data2vec.classifiers import LogisticRegression

    batches = SimpleNamespace(loader=lambda num_workers: [])
    vocab = SimpleNamespace(index=lambda symbol: 9)
    data = SimpleNamespace(vocab=vocab, config=SimpleNamespace(task=SimpleNamespace(data="DIR")))
    with pytest.raises(UsageError, match="task.data=DIR: a split has 0 masked tokens"):
        text_probe.collect(None, batches, 10, data, torch.device("cpu"), "fp32")
    fitted = LogisticRegression(torch.eye(4), torch.tensor([5, 5, 6, 6]), 2)
    assert fitted.predict(torch.zeros(0, 4)).tolist() == []


def test_probe_runs_on_a_checkpoint(golden, capsys):
    import probe

    arguments = ["--config-dir", str(PROJECT / "test"), "--config-name", "tiny", "--device", "cpu"]
    checkpoint = golden / "checkpoint_tiny.pt"
    results = probe.main([*arguments, f"task.data={golden / 'bin'}", f"common_eval.path={checkpoint}"])
    assert set(results) == {"untrained", "checkpoint"}
    assert "cloze retrieval" in capsys.readouterr().out
    assert 0 <= results["checkpoint"]["linear probe"] <= 100
    for row in ("count table", "count table of four"):
        assert results["checkpoint"][row] == results["untrained"][row] > 0
    assert results["checkpoint"]["teacher's probe"] != results["untrained"]["teacher's probe"]
