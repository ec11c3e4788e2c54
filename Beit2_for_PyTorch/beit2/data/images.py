"""Pretraining pictures: decoded once, augmented and masked, all from (seed, epoch, index)."""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np
import torch
from torch.utils.data import Dataset

from beit2.data.masking import MaskingGenerator
from beit2.data.picture_list import PictureList
from beit2.data.reading import read_image
from beit2.data.transforms import TwoViewTransform
from common.device import mix_seed


class PretrainingImages(Dataset):
    """Item (epoch, index) -> (view uint8 [S, S, 3], the tokenizer's view or None, mask bool [h, w])."""

    def __init__(self, paths: PictureList, transform: TwoViewTransform, masking: MaskingGenerator, seed: int):
        self.paths, self.transform, self.masking, self.seed = paths, transform, masking, seed

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, key: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
        epoch, index = key
        seed = mix_seed(self.seed, epoch, index)
        rng = random.Random(seed)
        image = read_image(self.paths[index])
        first, second = self.transform.apply(image, self.transform.draw(image.size, rng))
        mask = self.masking(rng, np.random.default_rng(seed))
        return first, second, torch.from_numpy(mask).bool()


@dataclass
class Batch:
    """Pictures of one micro-batch.

    Attributes:
        views: uint8 [B, S, S, 3].
        second_views: uint8 [B, T, T, 3]; None when they are the same pictures.
        mask: bool [B, h, w], with the same number of True in every sample.
    """

    views: torch.Tensor
    second_views: torch.Tensor | None
    mask: torch.Tensor

    def pin_memory(self) -> Batch:
        second = None if self.second_views is None else self.second_views.pin_memory()
        return Batch(self.views.pin_memory(), second, self.mask.pin_memory())


def collate(items: list[tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]]) -> Batch:
    views, seconds, masks = zip(*items, strict=True)
    second = None if seconds[0] is None else torch.stack(seconds)
    return Batch(torch.stack(views), second, torch.stack(masks))
