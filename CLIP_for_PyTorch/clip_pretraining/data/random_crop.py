"""Random resized crops, as open_clip trains with: a part of the picture of random size, place and proportion."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch.utils.data import Dataset

from clip_pretraining.data.images import decode_image
from clip_pretraining.data.pairs import DecodedImages
from common.device import mix_seed

PROPORTIONS = (3 / 4, 4 / 3)  # width over height, as torchvision's default and open_clip
_TRIES = 10


class RandomCrops(Dataset):
    """The pictures of `source`, each epoch another part of them: uint8 [3, S, S].

    What is drawn follows from (seed, epoch, picture), so that a resume and the number of loader workers change nothing.

    Args:
        smallest: least share of the picture's area, in 0..1; open_clip's default is 0.9.
    """

    def __init__(self, source: DecodedImages, smallest: float, seed: int):
        self.source, self.smallest, self.seed = source, smallest, seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> torch.Tensor:
        ref = self.source.images[index]
        draw = np.random.default_rng(mix_seed(self.seed, self.epoch, index))
        return decode_image(
            ref.read(), self.source.size, ref.name, box_of=lambda w, h: random_box(w, h, self.smallest, draw)
        )


def random_box(width: int, height: int, smallest: float, draw: np.random.Generator) -> tuple[int, int, int, int]:
    """(left, upper, right, lower) by the rule of torchvision's RandomResizedCrop with scale (smallest, 1)."""
    for _ in range(_TRIES):
        area = width * height * draw.uniform(smallest, 1)
        proportion = math.exp(draw.uniform(*map(math.log, PROPORTIONS)))
        w, h = round(math.sqrt(area * proportion)), round(math.sqrt(area / proportion))
        if 0 < w <= width and 0 < h <= height:
            left, upper = int(draw.integers(width - w + 1)), int(draw.integers(height - h + 1))
            return left, upper, left + w, upper + h
    w = min(width, round(height * PROPORTIONS[1]))  # none fits: the centre, as near to the proportions as may be
    h = min(height, round(width / PROPORTIONS[0]))
    left, upper = (width - w) // 2, (height - h) // 2
    return left, upper, left + w, upper + h
