"""Block-wise masking (BEiT, algorithm 1; reference `masking_generator.py`), with the reference's draws in its order."""

from __future__ import annotations

import math
import random
from types import ModuleType

import numpy as np


class MaskingGenerator:
    """Masks of exactly `num_masking_patches` patches made of rectangles, topped up with single patches.

    Args:
        input_size: window (height, width) in patches, or one number.
        num_masking_patches: how many patches to mask.
        min_num_patches: smallest area a rectangle is drawn for.
        max_num_patches: most patches one rectangle may add; None = num_masking_patches.
        min_aspect, max_aspect: of a rectangle; max defaults to 1 / min.

    Raises:
        ValueError: more patches to mask than there are, or fewer than one.
    """

    def __init__(
        self,
        input_size: int | tuple[int, int],
        num_masking_patches: int,
        min_num_patches: int = 16,
        max_num_patches: int | None = None,
        min_aspect: float = 0.3,
        max_aspect: float | None = None,
    ):
        self.height, self.width = (input_size, input_size) if isinstance(input_size, int) else input_size
        total = self.height * self.width
        if not 0 < num_masking_patches <= total:
            raise ValueError(
                f"{num_masking_patches} patches to mask (--num_mask_patches), but the window of {self.height} x "
                f"{self.width} has {total}"
            )
        self.num_masking_patches = num_masking_patches
        self.min_num_patches = min_num_patches
        self.max_num_patches = num_masking_patches if max_num_patches is None else max_num_patches
        self.log_aspect_ratio = (math.log(min_aspect), math.log(max_aspect or 1 / min_aspect))

    def __call__(
        self, python_rng: random.Random | ModuleType = random, numpy_rng: np.random.RandomState | ModuleType = np.random
    ) -> np.ndarray:
        """One mask, int32 [h, w] of 0 and 1. The rectangles come from `python_rng`, the top-up from `numpy_rng`."""
        mask = np.zeros((self.height, self.width), dtype=np.int32)
        count = 0
        while count < self.num_masking_patches:
            room = min(self.num_masking_patches - count, self.max_num_patches)
            added = self._add_rectangle(mask, room, python_rng)
            if added == 0:
                break
            count += added
        missing = self.num_masking_patches - count
        if missing > 0:
            free = np.flatnonzero(mask.ravel() == 0)
            mask.ravel()[numpy_rng.choice(free, missing, replace=False)] = 1
        return mask

    def _add_rectangle(self, mask: np.ndarray, room: int, rng: random.Random | ModuleType) -> int:
        """Fills a rectangle that adds at least one and at most `room` patches; 0 when ten draws found none."""
        for _ in range(10):
            area = rng.uniform(self.min_num_patches, room)  # the bounds may be in either order
            aspect = math.exp(rng.uniform(*self.log_aspect_ratio))
            height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if width >= self.width or height >= self.height:
                continue
            top = rng.randint(0, self.height - height)
            left = rng.randint(0, self.width - width)
            rectangle = mask[top : top + height, left : left + width]
            added = height * width - int(rectangle.sum())
            if 0 < added <= room:
                rectangle[:] = 1
                return added
        return 0
