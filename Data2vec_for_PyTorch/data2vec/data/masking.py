"""Span masking of a token sequence, with fairseq's generator and its order of draws (MaskTokensDataset)."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch

from data2vec.data.dictionary import MASK, Dictionary


def mask_tokens(
    item: np.ndarray | torch.Tensor,
    seed: int,
    epoch: int,
    index: int,
    vocab: Dictionary | None = None,
    pad_idx: int = 1,
    mask_idx: int | None = None,
    mask_prob: float = 0.15,
    leave_unmasked_prob: float = 0.1,
    random_token_prob: float = 0.1,
    freq_weighted_replacement: bool = False,
    mask_multiple_length: int = 1,
    mask_stdev: float = 0.0,
):
    """Masks spans of a sample; the result depends on (seed, epoch, index) alone.

    Args:
        item: token ids [T].
        seed, epoch, index: of the run, the pass over the data (from 1), the sample.
        vocab: needed for random replacement, and for `mask_idx` when that is not given.
        pad_idx: what the targets hold where nothing is masked.
        mask_idx: id of <mask>.
        mask_prob: share of tokens to mask; spans may overlap, so the true share is lower (0.31 for 0.35 and length 4).
        leave_unmasked_prob, random_token_prob: share of the masked tokens that stay, or become a random token.
        freq_weighted_replacement: random tokens by their count instead of evenly.
        mask_multiple_length, mask_stdev: length of a span, and its standard deviation.

    Returns:
        (source, target), each [T] and of the item's kind (NumPy or torch): the masked sequence, and the original ids at
        masked positions with `pad_idx` elsewhere.
    """
    if mask_idx is None:
        if vocab is None:
            raise ValueError("mask_tokens needs mask_idx, or a vocab with <mask>")
        mask_idx = vocab.index(MASK)
    tokens = np.asarray(item)
    # float modulo as in fairseq; a hash of a tuple of ints is the same in every process
    rng = np.random.default_rng(int(hash((int(seed), int(epoch), int(index))) % 1e6))
    mask = _span_mask(rng, len(tokens), mask_prob, mask_multiple_length, mask_stdev)
    target = np.where(mask, tokens, pad_idx)
    masked, random = _leave_or_replace(rng, mask, leave_unmasked_prob, random_token_prob)
    source = np.where(masked, mask_idx, tokens)
    if random is not None and (total := int(random.sum())):
        weights = _replacement_weights(vocab, freq_weighted_replacement)
        source[random] = rng.choice(len(weights), total, p=weights)
    if isinstance(item, torch.Tensor):
        return torch.from_numpy(source), torch.from_numpy(target)
    return source, target


def _span_mask(rng, size: int, prob: float, length: int, stdev: float) -> np.ndarray:
    """bool [size], True in the spans; those that reach beyond the end are cut off."""
    count = int(prob * size / float(length) + rng.random())
    begin = rng.choice(size, count, replace=False)
    if stdev > 0.0:
        lengths = [max(0, int(round(x))) for x in rng.normal(length, stdev, size=count)]
        spans = [np.arange(b, b + n) for b, n in zip(begin, lengths, strict=True)]
        positions = np.concatenate([np.zeros(0, np.int64), *spans])
    else:
        positions = (begin[None, :] + np.arange(length)[:, None]).ravel()
    mask = np.zeros(size, dtype=bool)
    mask[positions[positions < size]] = True
    return mask


def _leave_or_replace(rng, mask: np.ndarray, leave: float, replace: float) -> tuple[np.ndarray, np.ndarray | None]:
    """Which positions become <mask>, and which a random token; draws only when there is something to decide."""
    if leave + replace <= 0.0:
        return mask, None
    chosen = mask & (rng.random(len(mask)) < leave + replace)
    if replace == 0.0:
        return mask ^ chosen, None
    if leave == 0.0:
        return mask, chosen
    stays = rng.random(len(mask)) < leave / (leave + replace)
    return mask ^ (chosen & stays), chosen & ~stays


def _replacement_weights(vocab: Dictionary | None, by_frequency: bool) -> np.ndarray:
    if vocab is None:
        raise ValueError("random_token_prob above 0 needs the vocabulary: mask_tokens(..., vocab=dictionary)")
    return _cached_weights(tuple(vocab.count), vocab.nspecial, by_frequency)


@lru_cache(maxsize=4)
def _cached_weights(counts: tuple[int, ...], nspecial: int, by_frequency: bool) -> np.ndarray:
    weights = np.array(counts) if by_frequency else np.ones(len(counts))
    weights[:nspecial] = 0
    return weights / weights.sum()
