"""preprocess.py and bpe_encode.py: fairseq's bytes, whatever the number of workers; nothing is overwritten."""

import subprocess
import sys
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def scripts():
    import bpe_encode
    import preprocess

    return preprocess.main, bpe_encode.main


def prefixes(golden):
    return [
        "--only-source",
        "--trainpref",
        str(golden / "text/train.txt"),
        "--validpref",
        str(golden / "text/valid.txt"),
    ]


@pytest.mark.parametrize("workers", [1, 3])
def test_same_bytes_as_fairseq(scripts, golden, tmp_path, workers, monkeypatch):
    from data2vec.data import text_files

    monkeypatch.setattr(text_files.map_chunks, "__defaults__", (2000,))  # a dozen chunks
    scripts[0]([*prefixes(golden), "--destdir", str(tmp_path), "--workers", str(workers)])
    for name in ("dict.txt", "train.bin", "train.idx", "valid.bin", "valid.idx"):
        assert (tmp_path / name).read_bytes() == (golden / "bin" / name).read_bytes(), name
    assert "296 sents" in (tmp_path / "preprocess.log").read_text()


def test_given_dictionary_and_test_split(scripts, golden, tmp_path):
    arguments = ["--srcdict", str(golden / "bin/dict.txt"), "--testpref", str(golden / "text/valid.txt")]
    scripts[0]([*arguments, "--destdir", str(tmp_path)])
    assert (tmp_path / "test.bin").read_bytes() == (golden / "bin/valid.bin").read_bytes()
    assert (tmp_path / "dict.txt").read_bytes() == (golden / "bin/dict.txt").read_bytes()


def test_threshold_and_size_limit(scripts, tmp_path):
    (tmp_path / "t.txt").write_text("b b b a a a c c d\n")
    for name, flags, expected in (
        ("threshold", ["--thresholdsrc", "3"], "a 3\nb 3\n"),
        ("limit", ["--nwordssrc", "7"], "a 3\nb 3\nc 2\n"),
        ("both", ["--nwordssrc", "7", "--thresholdsrc", "3"], "a 3\nb 3\n"),
    ):
        arguments = ["--trainpref", str(tmp_path / "t.txt"), "--destdir", str(tmp_path / name)]
        scripts[0]([*arguments, "--padding-factor", "1", *flags])
        assert (tmp_path / name / "dict.txt").read_text() == expected


def refused(main, capsys, arguments):
    with pytest.raises(SystemExit) as error:
        main(arguments)
    assert error.value.code == 2
    return capsys.readouterr().err


def test_preprocess_refusals(scripts, golden, tmp_path, capsys):
    (tmp_path / "train.bin").write_bytes(b"mine")
    assert "not overwritten" in refused(scripts[0], capsys, [*prefixes(golden), "--destdir", str(tmp_path)])
    assert (tmp_path / "train.bin").read_bytes() == b"mine"
    assert not (tmp_path / "dict.txt").exists()
    assert "train.bin" in refused(scripts[0], capsys, [*prefixes(golden), "--destdir", str(tmp_path / "train.bin")])
    assert "nothing to do" in refused(scripts[0], capsys, ["--destdir", str(tmp_path)])
    valid_only = ["--validpref", str(golden / "text/valid.txt")]
    assert "--srcdict" in refused(scripts[0], capsys, valid_only)
    assert "/none" in refused(scripts[0], capsys, ["--trainpref", "/none"])
    (tmp_path / "latin1.txt").write_bytes(b"fine\ncaf\xe9\n")
    latin1 = ["--trainpref", str(tmp_path / "latin1.txt"), "--destdir", str(tmp_path / "new")]
    assert "not UTF-8 at byte 8" in refused(scripts[0], capsys, latin1)


def test_line_ends_are_those_of_text_mode(tmp_path):
    from data2vec.data.text_files import chunk_ends, read_lines

    path = tmp_path / "t"
    path.write_bytes(b"one\r\ntwo\n\nthree\rfour")
    assert read_lines(path, 0, path.stat().st_size) == path.read_text().splitlines()
    for size in (1, 4, 7, 100):
        pieces = [line for start, stop in chunk_ends(path, size) for line in read_lines(path, start, stop)]
        assert pieces == ["one", "two", "", "three", "four"]


@pytest.fixture(scope="module")
def learned(tmp_path_factory):
    """A folder with a small BPE vocabulary in GPT-2's files, and the text it was made from."""
    folder = tmp_path_factory.mktemp("bpe")
    (folder / "raw.txt").write_text("The cat sat.\n\n  It's 3 o'clock — née\tX \n" * 50, encoding="utf-8")
    command = [sys.executable, str(PROJECT / "bpe_encode.py"), "--learn", "300", "--keep-empty"]
    command += ["--encoder-json", "e.json", "--vocab-bpe", "v.bpe", "--inputs", "raw.txt", "--outputs", "raw.bpe"]
    subprocess.run(command, cwd=folder, check=True)
    return folder


def test_bpe_round_trip(learned):
    from tokenizers import ByteLevelBPETokenizer

    tokenizer = ByteLevelBPETokenizer.from_file(str(learned / "e.json"), str(learned / "v.bpe"))
    lines = (learned / "raw.bpe").read_text().splitlines()
    raw = (learned / "raw.txt").read_text().splitlines()
    assert len(lines) == len(raw)
    for line, text in zip(lines, raw, strict=True):
        assert tokenizer.decode([int(i) for i in line.split()]) == text.strip()


def test_bpe_workers_and_empty_lines(scripts, learned, tmp_path, capsys, monkeypatch):
    from data2vec.data import text_files

    monkeypatch.setattr(text_files.map_chunks, "__defaults__", (300,))
    files = ["--encoder-json", str(learned / "e.json"), "--vocab-bpe", str(learned / "v.bpe")]
    arguments = [*files, "--inputs", str(learned / "raw.txt"), "--outputs"]
    scripts[1]([*arguments, str(tmp_path / "kept"), "--keep-empty", "--workers", "2"])
    assert (tmp_path / "kept").read_text() == (learned / "raw.bpe").read_text()
    scripts[1]([*arguments, str(tmp_path / "dropped")])
    assert (tmp_path / "dropped").read_text() == (learned / "raw.bpe").read_text().replace("\n\n", "\n")
    assert "not overwritten" in refused(scripts[1], capsys, [*arguments, str(tmp_path / "kept")])


def test_bpe_refusals_leave_nothing_behind(scripts, learned, tmp_path, capsys):
    (tmp_path / "latin1").write_bytes(b"fine\ncaf\xe9\n")
    (tmp_path / "other").write_text("not merges")
    vocabulary, merges, text = (str(learned / name) for name in ("e.json", "v.bpe", "raw.txt"))
    output = str(tmp_path / "o")
    for files, inputs, outputs, words in (
        ([vocabulary, str(tmp_path / "other")], [text], [output], "not GPT-2's two files"),
        ([vocabulary, merges], [str(tmp_path / "latin1")], [output], "latin1: not UTF-8 at byte 8"),
        ([vocabulary, merges], [text, text], [output, output], "one file for each input"),
        ([str(tmp_path / "e"), str(tmp_path / "v"), "--learn", "300"], [str(tmp_path / "latin1")], [output], "UTF-8"),
        (
            [str(tmp_path / "e"), str(tmp_path / "v"), "--learn", "255"],
            [text],
            [output],
            "--learn 255: give 256 or more",
        ),
        ([vocabulary, merges, "--learn", "0"], [text], [output], "--learn 0: give 256 or more"),
    ):
        arguments = ["--encoder-json", files[0], "--vocab-bpe", *files[1:], "--inputs", *inputs, "--outputs", *outputs]
        message = refused(scripts[1], capsys, arguments)
        assert words in message and message.count("\n") == 1
        assert sorted(path.name for path in tmp_path.iterdir()) == ["latin1", "other"]


def test_gpt2_ids(scripts, sample_data, tmp_path):
    """GPT-2's own vocabulary, its published ids."""
    folder = sample_data / "text" / "gpt2_bpe"
    (tmp_path / "raw").write_text("Hello world!\n\n the  cat's\n")
    files = ["--encoder-json", str(folder / "encoder.json"), "--vocab-bpe", str(folder / "vocab.bpe")]
    scripts[1]([*files, "--inputs", str(tmp_path / "raw"), "--outputs", str(tmp_path / "bpe"), "--keep-empty"])
    assert (tmp_path / "bpe").read_text() == "15496 995 0\n\n1169 220 3797 338\n"
