"""Which samples form a batch, and in which order: fairseq's plan, to the sample (data_utils.py, iterators.py)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np


def ordered_indices(sizes: np.ndarray, seed: int) -> np.ndarray:
    """Samples by size, equal sizes in a random order that is the same in every epoch (SortDataset over a shuffle)."""
    shuffle = np.random.RandomState(seed).permutation(len(sizes))
    return np.lexsort([shuffle, sizes])


def filter_by_size(indices: np.ndarray, sizes: np.ndarray, max_size: int) -> tuple[np.ndarray, np.ndarray]:
    """(kept, dropped): samples longer than the model has positions for are left out."""
    fits = sizes[indices] <= max_size
    return indices[fits], indices[~fits]


def batch_by_size(
    indices: np.ndarray | Sequence[int],
    num_tokens_fn: Callable[[int], int] | None = None,
    num_tokens_vec: np.ndarray | Sequence[int] | None = None,
    max_tokens: int | None = None,
    max_sentences: int | None = None,
    required_batch_size_multiple: int = 1,
) -> list[np.ndarray]:
    """Groups consecutive indices so that rows * longest row stays within `max_tokens` (`batch_by_size_vec`).

    Args:
        indices: samples in order, best sorted by size.
        num_tokens_fn: size of a sample by its index, or
        num_tokens_vec: the sizes, aligned with `indices`.
        max_tokens, max_sentences: limits of a batch, padding counted; None for no limit.
        required_batch_size_multiple: rows of a batch are a multiple of it, or fewer than it.

    Returns:
        Arrays of indices. As in fairseq, a last batch whose row count is no multiple is dropped.

    Raises:
        ValueError: a sample larger than `max_tokens`.
    """
    indices = np.asarray(indices, dtype=np.int64)
    if num_tokens_vec is None:
        if num_tokens_fn is None:
            raise ValueError("batch_by_size needs num_tokens_fn or num_tokens_vec")
        num_tokens_vec = [num_tokens_fn(int(index)) for index in indices]
    sizes = np.asarray(num_tokens_vec, dtype=np.int64)
    if len(sizes) != len(indices):
        raise ValueError(f"num_tokens_vec has {len(sizes)} entries for {len(indices)} indices: it must be aligned")
    if len(indices) == 0:
        return []
    limit = max_tokens if max_tokens and max_tokens > 0 else None
    if limit and sizes.max() > limit:
        worst = int(indices[sizes.argmax()])
        raise ValueError(f"sample {worst} has {sizes.max()} tokens, more than dataset.max_tokens={limit}: raise it")

    multiple = required_batch_size_multiple
    batches = np.split(indices, _batch_ends(sizes.tolist(), limit, max_sentences or 0, multiple))
    if multiple > 1 and len(batches[-1]) % multiple != 0:
        batches = batches[:-1]
    return batches


def _batch_ends(sizes: list[int], max_tokens: int | None, max_sentences: int, multiple: int) -> list[int]:
    """Where batches end. `start..ends[-1]` is the batch in the making, what follows it a tail not yet admitted.

    A tail is admitted when batch and tail together keep the limits and have an allowed row count. When they break a
    limit the batch is closed and the tail begins the next one; when the tail alone breaks it, two batches are closed.
    """
    ends = [0]
    start = batch_longest = tail_longest = 0
    for position, size in enumerate(sizes):
        tail_longest = max(tail_longest, size)
        longest = max(batch_longest, tail_longest)
        rows = position + 1 - start
        overflow = rows > max_sentences > 0 or (max_tokens is not None and rows * longest > max_tokens)
        fits_multiple = rows < multiple or rows % multiple == 0
        if overflow:
            if max_tokens is not None and tail_longest * (position + 1 - ends[-1]) > max_tokens:
                ends.append(position)
                tail_longest = size
            start = ends[-1]
            ends.append(start)
            longest = tail_longest
        if overflow or fits_multiple:
            ends[-1] = position + 1
            batch_longest = longest
            tail_longest = 0
    return ends if ends[-1] != len(sizes) else ends[:-1]


def epoch_batches(
    batches: list[np.ndarray], seed: int, epoch: int, shards: int = 1, shard: int = 0, shuffle: bool = True
) -> list[np.ndarray]:
    """This rank's batches of an epoch, in order: shuffled by (seed + epoch), dealt out in turn.

    Shards that come out one short get an empty batch, so that all ranks do the same number of steps.
    """
    order = list(batches)
    if shuffle:
        np.random.RandomState(seed + epoch).shuffle(order)
    own = order[shard::shards]
    longest = -(-len(order) // shards)
    return own + [np.zeros(0, np.int64)] * (longest - len(own))
