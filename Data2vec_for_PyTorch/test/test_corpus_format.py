"""The `.bin/.idx` pair and `dict.txt`: bytes and values as fairseq writes and reads them, and clear refusals."""

import hashlib
import json
import pickle
import shutil

import numpy as np
import pytest

from data2vec import Dictionary, IndexedDataset, IndexedDatasetBuilder
from data2vec.data.indexed_dataset import best_fitting_int_dtype

DTYPES = ("uint8", "int8", "int16", "int32", "int64", "uint16", "uint32", "float64")


@pytest.mark.parametrize("dtype", DTYPES)
def test_reads_every_dtype(golden, dtype):
    expected = np.load(golden / "mmap" / "expected.npz")
    dataset = IndexedDataset(golden / "mmap" / dtype)
    assert dataset.sizes.tolist() == expected[f"{dtype}/sizes"].tolist()
    for i in range(len(dataset)):
        np.testing.assert_array_equal(dataset[i].numpy(), expected[f"{dtype}/item{i}"])


@pytest.mark.parametrize("dtype", DTYPES)
def test_writes_the_same_bytes(golden, tmp_path, dtype):
    source = IndexedDataset(golden / "mmap" / dtype)
    builder = IndexedDatasetBuilder(tmp_path / "copy", np.dtype(dtype))
    raw = np.fromfile(golden / "mmap" / f"{dtype}.bin", dtype)  # items as ints lose the fractions of float64
    ends = np.cumsum(source.sizes)
    for start, end in zip(ends - source.sizes, ends, strict=True):
        builder.add_item(raw[start:end])
    builder.finalize()
    for kind in ("bin", "idx"):
        assert (tmp_path / f"copy.{kind}").read_bytes() == (golden / "mmap" / f"{dtype}.{kind}").read_bytes()


def test_merges_corpora(golden, tmp_path):
    expected = np.load(golden / "mmap" / "expected.npz")
    builder = IndexedDatasetBuilder(tmp_path / "merged", np.int32)
    builder.add_item(IndexedDataset(golden / "mmap" / "merged_int32")[0])
    builder.merge_file(golden / "mmap" / "int32")
    builder.finalize()
    assert IndexedDataset(tmp_path / "merged").sizes.tolist() == expected["merged_int32/sizes"].tolist()
    for kind in ("bin", "idx"):
        assert (tmp_path / f"merged.{kind}").read_bytes() == (golden / "mmap" / f"merged_int32.{kind}").read_bytes()


def test_pickles_by_path(golden):
    dataset = pickle.loads(pickle.dumps(IndexedDataset(golden / "bin" / "train")))
    assert len(pickle.dumps(dataset)) < 500
    assert len(dataset) == 296


def test_golden_corpus(golden):
    for split, expected in json.loads((golden / "bin_expected.json").read_text()).items():
        if split == "valid":  # its index is made by preprocess in another test; both are in the goldens
            assert (golden / "bin" / "valid.idx").exists()
        dataset = IndexedDataset(golden / "bin" / split)
        assert dataset.sizes.tolist() == expected["sizes"]
        assert np.dtype(dataset.dtype).name == expected["dtype"]
        tokens = dataset.token_range(0, int(dataset.sizes.sum()))
        assert hashlib.sha256(tokens.tobytes()).hexdigest()[:16] == expected["sha"]


def test_best_fitting_dtype():
    assert [best_fitting_int_dtype(n) for n in (65499, 65500, 2**32 - 1)] == [np.uint16, np.uint32, np.int64]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda p: (p / "train.idx").write_bytes(b"TNTIDX\x00\x00" + bytes(40)), "preprocess"),
        (lambda p: (p / "train.idx").write_bytes(b"something else entirely"), "not a fairseq mmap index"),
        (lambda p: (p / "train.idx").write_bytes((p / "train.idx").read_bytes()[:-5]), "cut short"),
        (lambda p: (p / "train.idx").write_bytes((p / "train.idx").read_bytes()[:12]), "header"),
        (lambda p: (p / "train.idx").write_bytes((p / "train.idx").read_bytes() + bytes(8)), "Megatron"),
        (lambda p: (p / "train.bin").write_bytes((p / "train.bin").read_bytes()[:-2]), "cut short"),
        (lambda p: shutil.copy(p / "valid.idx", p / "train.idx"), "different runs"),
    ],
)
def test_damaged_pairs_are_named(corpus, damage, message):
    damage(corpus)
    with pytest.raises(ValueError, match=message) as error:
        IndexedDataset(corpus / "train")
    assert "train." in str(error.value)


def test_missing_file_is_named(corpus):
    (corpus / "train.bin").unlink()
    with pytest.raises(FileNotFoundError, match="train.bin"):
        IndexedDataset(corpus / "train")


def test_builder_does_not_overwrite(corpus):
    with pytest.raises(FileExistsError, match="train.bin"):
        IndexedDatasetBuilder(corpus / "train")


def test_dictionary(golden):
    expected = json.loads((golden / "dict_expected.json").read_text())
    dictionary = Dictionary.load(golden / "bin" / "dict.txt")
    assert len(dictionary) == expected["len_before_mask"]
    assert dictionary.add_symbol("<mask>") == expected["mask_idx"]
    assert dictionary.symbols == expected["symbols"]
    assert dictionary.count == expected["counts"]
    for line, ids in expected["encode"].items():
        assert dictionary.encode_line(line).tolist() == ids


@pytest.mark.parametrize(("line", "message"), [("a 1\na 2\n", "twice"), ("a\n", "line 1"), ("a x\n", "line 1")])
def test_bad_dictionary(tmp_path, line, message):
    (tmp_path / "dict.txt").write_text(line)
    with pytest.raises(ValueError, match=message):
        Dictionary.load(tmp_path / "dict.txt")


def test_dictionary_overwrite_flag(tmp_path):
    (tmp_path / "dict.txt").write_text("a 1\n<unk> 2 #fairseq:overwrite\n")
    dictionary = Dictionary.load(tmp_path / "dict.txt")
    assert dictionary.index("<unk>") == 5
