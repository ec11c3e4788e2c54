"""Which tokens and patches data2vec 2.0 hides; every mask of a batch leaves the same share visible."""

from __future__ import annotations

import numpy as np


def random_masks(length: int, masks: int, mask_prob: float, rng: np.random.Generator) -> np.ndarray:
    """bool [M, T], True at single tokens that are hidden: all but int(T (1 - mask_prob)), at least one, are."""
    visible = max(1, int(length * (1 - mask_prob)))
    hidden = np.ones((masks, length), dtype=bool)
    for mask in hidden:
        mask[rng.permutation(length)[:visible]] = False
    return hidden


def block_masks(
    side: int,
    masks: int,
    mask_prob: float,
    block: int,
    rng: np.random.Generator,
    inverse: bool = False,
    adjust: float = 0.0,
    dropout: float = 0.0,
) -> np.ndarray:
    """bool [M, S * S], True at hidden patches: squares at random places, then single patches for the exact number.

    Args:
        side: S, of the grid of patches.
        block: side of a square; it is cut off at the picture's edges, onto the edge.
        inverse: the squares are what stays visible (the paper's inverse block masking), of 1 - mask_prob in all.
        adjust: added to the share that squares are drawn for, since they overlap.
        dropout: more squares by this share.
    """
    patches, share = side * side, 1 - mask_prob if inverse else mask_prob
    squares = max(0, int(patches * ((share + adjust) / block**2) * (1 + dropout)))
    offsets = np.arange(block) - block // 2
    chosen = np.zeros((masks, side, side), dtype=bool)
    for mask in chosen:
        top, left = rng.integers(0, side, squares), rng.integers(0, side, squares)
        rows = np.clip(top[:, None] + offsets, 0, side - 1)  # [squares, block]
        columns = np.clip(left[:, None] + offsets, 0, side - 1)
        mask[rows[:, :, None], columns[:, None, :]] = True
        _make_exact(mask.reshape(-1), int(patches * share), rng)
    chosen = chosen.reshape(masks, patches)
    return ~chosen if inverse else chosen


def _make_exact(mask: np.ndarray, wanted: int, rng: np.random.Generator) -> None:
    """Switches random places until `wanted` are True."""
    surplus = int(mask.sum()) - wanted
    places = np.flatnonzero(mask if surplus > 0 else ~mask)
    mask[rng.choice(places, abs(surplus), replace=False)] = surplus < 0
