"""Blocks, masks, batches and epoch order, exactly as the goldens."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data2vec import Dictionary, IndexedDataset, TokenBlockDataset, batch_by_size, mask_tokens
from data2vec.data.batching import epoch_batches, filter_by_size, ordered_indices


@pytest.fixture(scope="module")
def blocks_golden(golden):
    return np.load(golden / "token_block.npz")


@pytest.mark.parametrize("mode", ["none", "complete", "complete_doc", "eos"])
def test_blocks_of_the_corpus(golden, blocks_golden, mode):
    corpus = IndexedDataset(golden / "bin" / "train")
    for size in {key.split("/")[1] for key in blocks_golden.files if key.startswith(f"{mode}/")}:
        expected = {key: blocks_golden[f"{mode}/{size}/{key}"] for key in ("slice_indices", "block_to_dataset_index")}
        blocks = TokenBlockDataset(corpus, corpus.sizes, int(size), 1, 2, break_mode=mode)
        np.testing.assert_array_equal(blocks.slice_indices, expected["slice_indices"])
        np.testing.assert_array_equal(blocks.block_to_dataset_index, expected["block_to_dataset_index"])
        np.testing.assert_array_equal(blocks.sizes, blocks_golden[f"{mode}/{size}/sizes"])
        np.testing.assert_array_equal(blocks[0].numpy(), blocks_golden[f"{mode}/{size}/item_first"])
        np.testing.assert_array_equal(blocks[len(blocks) - 1].numpy(), blocks_golden[f"{mode}/{size}/item_last"])
        row = torch.cat([blocks[i] for i in range(len(blocks))]).numpy()
        assert hashlib.sha256(row.tobytes()).hexdigest()[:16] == str(blocks_golden[f"{mode}/{size}/all_sha"])


@pytest.mark.parametrize("edge", ["edge1", "edge2", "edge3", "edge4"])
@pytest.mark.parametrize("mode", ["none", "complete", "complete_doc", "eos"])
def test_block_edge_cases(blocks_golden, edge, mode):
    key = f"{edge}/{mode}"
    sizes = blocks_golden[f"{key}/in"]
    sentences = [torch.arange(n) + 100 * i for i, n in enumerate(sizes)]
    blocks = TokenBlockDataset(sentences, sizes, 8, pad=1, eos=2, break_mode=mode)
    np.testing.assert_array_equal(blocks.slice_indices, blocks_golden[f"{key}/slice_indices"])
    np.testing.assert_array_equal(blocks.block_to_dataset_index, blocks_golden[f"{key}/block_to_dataset_index"])
    row = torch.cat(sentences)
    for i, (start, stop) in enumerate(blocks.slice_indices):
        assert blocks[i].tolist() == row[start:stop].tolist()


def slow_blocks(sizes, mode, block_size, separator=1):
    """The reference's loop, sentence by sentence (token_block_utils_fast.pyx)."""
    found, token, i, current = [], 0, 0, 0
    while i < len(sizes):
        is_separator = mode == "complete_doc" and sizes[i] == separator
        if (current + sizes[i] <= block_size or current == 0) and not is_separator:
            current += sizes[i]
            i += 1
            continue
        if current > (mode == "complete_doc"):
            found.append([token, token + current])
        token += current
        current = 0
        if is_separator:
            token += sizes[i]
            i += 1
    if current > (mode == "complete_doc"):
        found.append([token, token + current])
    return found


@settings(deadline=None, max_examples=200)
@given(st.lists(st.integers(0, 12), max_size=40), st.sampled_from(["complete", "complete_doc"]), st.integers(1, 15))
def test_blocks_equal_the_plain_loop(sizes, mode, block_size):
    blocks = TokenBlockDataset([torch.zeros(n) for n in sizes], sizes, block_size, break_mode=mode)
    assert blocks.slice_indices.tolist() == slow_blocks(sizes, mode, block_size)


def test_unknown_break_mode():
    with pytest.raises(ValueError, match="complete_doc"):
        TokenBlockDataset([], [], 8, break_mode="sentence")


def training_samples(golden):
    corpus = IndexedDataset(golden / "bin" / "train")
    blocks = TokenBlockDataset(corpus, corpus.sizes, 63, break_mode="complete_doc")
    return [torch.cat([torch.tensor([0]), blocks[i]]) for i in range(len(blocks))]


def test_masks(golden):
    expected = np.load(golden / "mask.npz")
    configs = json.loads((golden / "mask_configs.json").read_text())
    vocab = Dictionary.load(golden / "bin" / "dict.txt")
    vocab.add_symbol("<mask>")
    samples = training_samples(golden)
    checked = 0
    for key in expected.files:
        if not key.endswith("/src"):
            continue
        name, seed, epoch, index, _ = key.split("/")
        seed, epoch, index = int(seed[4:]), int(epoch[2:]), int(index[1:])
        source, target = mask_tokens(samples[index], seed, epoch, index, vocab=vocab, **configs[name])
        np.testing.assert_array_equal(source, expected[key], err_msg=key)
        np.testing.assert_array_equal(target, expected[key.replace("/src", "/tgt")], err_msg=key)
        checked += 1
    assert checked > 100


def test_tuple_hash(golden):
    for *key, expected in np.load(golden / "mask.npz")["tuple_hash_check"].tolist():
        assert int(hash(tuple(key)) % 1e6) == expected


def test_mask_needs_vocab_for_random_tokens():
    with pytest.raises(ValueError, match="vocab"):
        mask_tokens(np.arange(50) + 4, 1, 1, 0, mask_idx=99, random_token_prob=0.9, mask_prob=0.9)


@pytest.fixture(scope="module")
def batching(golden):
    return json.loads((golden / "batching.json").read_text())


def test_order(batching, train_sizes):
    assert np.random.RandomState(1).permutation(118).tolist() == batching["shuffle_perm"]
    assert ordered_indices(train_sizes, seed=1).tolist() == batching["ordered_indices"]


def test_batches(batching, train_sizes):
    indices = np.array(batching["ordered_indices"])
    for key, expected in batching.items():
        if not key.startswith("batch_by_size/"):
            continue
        tokens, sentences, multiple = (part[2:] for part in key.split("/")[1].replace("mult", "mu").split("_"))
        limits = {
            "max_tokens": None if tokens == "None" else int(tokens),
            "max_sentences": None if sentences == "None" else int(sentences),
            "required_batch_size_multiple": int(multiple),
        }
        if limits["max_tokens"] and limits["max_tokens"] < train_sizes.max():
            kept, _ = filter_by_size(indices, train_sizes, limits["max_tokens"])
        else:
            kept = indices
        batches = batch_by_size(kept, num_tokens_vec=train_sizes[kept], **limits)
        assert [b.tolist() for b in batches] == expected, key
        by_function = batch_by_size(kept, lambda i: train_sizes[i], **limits)
        assert [b.tolist() for b in by_function] == expected, key


def test_too_long_sample_is_named():
    with pytest.raises(ValueError, match="sample 7 has 30 tokens"):
        batch_by_size(np.array([3, 7]), num_tokens_vec=[5, 30], max_tokens=20)


def test_epoch_order(golden, batching, train_sizes):
    indices, _ = filter_by_size(np.array(batching["ordered_indices"]), train_sizes, 64)
    batches = batch_by_size(
        indices, num_tokens_vec=train_sizes[indices], max_tokens=256, required_batch_size_multiple=8
    )
    golden_order = json.loads((golden / "epoch_order.json").read_text())
    for key, lists in golden_order.items():
        count, epoch = (int("".join(filter(str.isdigit, part))) for part in key.split("/"))
        # fairseq handed its cached iterator out again when asked for the second shard: that list is the first shard's
        # of the next epoch
        for later, expected in enumerate(lists):
            order = epoch_batches(batches, seed=1, epoch=epoch + later, shards=count, shard=0)
            assert [b.tolist() for b in order] == expected, key
    second = [b.tolist() for b in epoch_batches(batches, seed=1, epoch=1, shards=2, shard=1)]
    assert second == golden_order["shards1/epoch1"][0][1::2] + [[]]


LARGE = """
import resource, sys
from pathlib import Path

import numpy as np

sys.path[:0] = [{root!r}, {project!r}]
from data2vec.config import load_config
from data2vec.data.indexed_dataset import IndexedDatasetBuilder
from data2vec.data.pretraining_data import PretrainingData

folder = Path({folder!r})
builder = IndexedDatasetBuilder(folder / "train", np.int64)
builder._sizes.append(np.full({sentences}, 4096, dtype=np.int32))
builder.finalize()
with open(folder / "train.bin", "r+b") as file:
    file.truncate({sentences} * 4096 * 8)  # zeros that take no room on the disk
(folder / "dict.txt").write_text("word 1\\n")
settings = ["task.data=" + str(folder), "task.sample_break_mode=none", "task.tokens_per_sample=4097"]
settings += ["model.transformer.max_source_positions=4097", "dataset.max_tokens=8194"]
settings += ["dataset.disable_validation=true", "dataset.required_batch_size_multiple=1"]
config, _ = load_config({project!r} + "/test", "tiny", settings)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
data = PretrainingData(config)
data.open_splits()
batch = next(data.train_batches(1).loader(0))
assert batch.src_tokens.shape == (2, 4097)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_a_large_corpus_is_mapped_and_not_read(tmp_path):
    """4 GB of tokens: opening them, planning an epoch and making a batch take a fraction of that in memory."""
    project = Path(__file__).resolve().parents[1]
    sentences = 1 << 17
    code = LARGE.format(root=str(project.parent), project=str(project), folder=str(tmp_path), sentences=sentences)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    kilobytes = int(done.stdout)
    assert 0 <= kilobytes < sentences * 4096 * 8 / 1024 / 16  # 0: importing torch had taken more
