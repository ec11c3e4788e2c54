"""Block-wise masks for images (BEiT, algorithm 1), with the draws of fairseq's `Data2VecVisionModel.make_mask`."""

from __future__ import annotations

import math
import random

import numpy as np

MIN_ASPECT = 0.3
ATTEMPTS = 10


def block_mask(
    window: tuple[int, int], num_mask_patches: int, min_patches: int, max_patches: int, rng: random.Random
) -> np.ndarray:
    """bool [rows, columns], True where a patch is hidden: rectangles until about `num_mask_patches` are covered.

    Fewer are covered when ten draws in a row give no rectangle that fits, as in the reference.

    Args:
        window: (rows, columns) of patches.
        num_mask_patches: how many to hide at most.
        min_patches, max_patches: area that a rectangle is drawn for, and the most it may newly cover.
        rng: the draws; two images with generators of one seed get one mask.
    """
    mask = np.zeros(window, dtype=bool)
    covered = 0
    while covered < num_mask_patches:
        added = _add_rectangle(mask, min_patches, min(num_mask_patches - covered, max_patches), rng)
        if added == 0:
            break
        covered += added
    return mask


def _add_rectangle(mask: np.ndarray, least: int, most: int, rng: random.Random) -> int:
    """Covers a rectangle that adds between 1 and `most` patches; 0 when `ATTEMPTS` draws found none."""
    rows, columns = mask.shape
    bounds = math.log(MIN_ASPECT), math.log(1 / MIN_ASPECT)
    for _ in range(ATTEMPTS):
        area = rng.uniform(least, most)  # towards the end `most` is below `least`: the reference's draw, too
        aspect = math.exp(rng.uniform(*bounds))
        height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if height >= rows or width >= columns:
            continue
        top, left = rng.randint(0, rows - height), rng.randint(0, columns - width)
        rectangle = mask[top : top + height, left : left + width]
        added = rectangle.size - int(rectangle.sum())
        if 0 < added <= most:
            rectangle[:] = True
            return added
    return 0
