"""Corpora of several files and folders, vocabularies with <mask>, and what a run says about them."""

import json
import shutil

import numpy as np
import pytest

from data2vec import Dictionary, IndexedDataset
from data2vec.config import load_config
from data2vec.data.indexed_dataset import JoinedCorpus, parts_of, write_corpus
from data2vec.data.pretraining_data import PretrainingData
from data2vec.data.token_blocks import TokenBlockDataset


def test_several_training_files_are_counted_whole_and_read_whole(golden, tmp_path, project):
    """`--trainpref a,b` makes the vocabulary of one file that holds both, and their samples."""
    import preprocess

    text = (golden / "text/train.txt").read_text()
    cut = text.index("\n\n", len(text) // 3) + 2  # between two documents
    for name, part in (("all", text), ("a", text[:cut]), ("b", text[cut:])):
        (tmp_path / f"{name}.txt").write_text(part)
    valid = ["--validpref", str(golden / "text/valid.txt")]
    for name, train in (("one", "all.txt"), ("two", f"a.txt,{tmp_path}/b.txt")):
        preprocess.main(
            ["--only-source", "--trainpref", f"{tmp_path}/{train}", *valid, "--destdir", f"{tmp_path}/{name}"]
        )
    assert (tmp_path / "one/dict.txt").read_text() == (tmp_path / "two/dict.txt").read_text()
    assert [path.name for path in parts_of(tmp_path / "two/train")] == ["train", "train1"]
    samples, notes = {}, {}
    for name in ("one", "two"):
        config, _ = load_config(project / "test", "tiny", [f"task.data={tmp_path / name}"])
        data = PretrainingData(config)
        samples[name], notes[name] = data.split("train", training=True)[0], data.notes
    assert len(samples["one"]) == len(samples["two"])
    for index in range(len(samples["one"])):
        np.testing.assert_array_equal(samples["one"].sample(index), samples["two"].sample(index))
    assert "train: read together with train1" in notes["two"] and not any("together" in note for note in notes["one"])


def test_blocks_go_over_the_end_of_a_file(golden, tmp_path):
    whole = IndexedDataset(golden / "bin/train")
    for name, rows in (("train", range(100)), ("train1", range(100, len(whole)))):
        write_corpus(tmp_path / name, [whole[i].numpy() for i in rows], np.uint16)
    joined = JoinedCorpus(parts_of(tmp_path / "train"))
    for mode in ("none", "complete", "complete_doc", "eos"):
        a, b = (TokenBlockDataset(corpus, corpus.sizes, 50, break_mode=mode) for corpus in (whole, joined))
        assert len(a) == len(b)
        for i in range(len(a)):
            np.testing.assert_array_equal(a.tokens(i), b.tokens(i))


def test_each_epoch_takes_the_next_folder(golden, tmp_path, project):
    """fairseq's `task.data=a:b`: training from a, b, a, ...; vocabulary and validation from a."""
    import train

    (tmp_path / "b").mkdir()
    shutil.copy(golden / "bin/dict.txt", tmp_path / "b")
    whole = IndexedDataset(golden / "bin/train")
    write_corpus(tmp_path / "b/train", [whole[i].numpy() for i in range(60)], np.uint16)
    setting = f"task.data={golden / 'bin'}:{tmp_path / 'b'}"
    options = ["--config-dir", str(project / "test"), "--config-name", "tiny", "--device", "cpu", setting]
    options += ["optimization.max_epoch=3", "optimization.max_update=90", "--log_every", "1", "--output_dir"]
    train.main([*options, str(tmp_path / "out")])
    lines = [json.loads(line) for line in (tmp_path / "out/metrics.jsonl").read_text().splitlines()]
    epochs = [line["epoch"] for line in lines if line["kind"] == "train"]
    counts = [sum(e < x <= e + 1 for x in epochs) for e in range(3)]
    assert counts[0] == counts[2] == 19 and 0 < counts[1] < 10
    with pytest.raises(SystemExit):
        train.main([*options, str(tmp_path / "no"), f"task.data={golden / 'bin'}:/does/not/exist"])


@pytest.mark.parametrize("place", [0, 7])
def test_mask_may_stand_anywhere_in_the_vocabulary(golden, tmp_path, project, place):
    lines = (golden / "bin/dict.txt").read_text().splitlines()
    (tmp_path / "dict.txt").write_text("\n".join([*lines[:place], "<mask> 0", *lines[place:]]) + "\n")
    whole = IndexedDataset(golden / "bin/train")
    before = Dictionary.load(golden / "bin/dict.txt")
    now = Dictionary.load(tmp_path / "dict.txt")
    renumbered = np.array([now.index(symbol) for symbol in before.symbols])
    for split in ("train", "valid"):
        write_corpus(tmp_path / split, [renumbered[whole[i].numpy()] for i in range(60)], np.uint16)
    config, _ = load_config(project / "test", "tiny", [f"task.data={tmp_path}"])
    data = PretrainingData(config)
    batch = next(iter(data.train_batches(1).loader(0)))
    assert len(data.vocab) == len(now) == 169 and (batch.src_tokens == 4 + place).sum() > 0
    write_corpus(tmp_path / "bad", [np.array([4 + place, 2])] * 20, np.uint16)
    with pytest.raises(SystemExit) as error:
        data.split("bad", training=False)
    assert f"holds token id {4 + place}" in str(error.value)
