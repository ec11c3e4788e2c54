"""Pictures with several block masks each: fairseq's mae_image_pretraining task."""

from __future__ import annotations

import numpy as np
import torch
from omegaconf import DictConfig
from torchvision.transforms import Compose, InterpolationMode, RandomHorizontalFlip, RandomResizedCrop

from common.device import mix_seed
from data2vec.data.image_data import ImagePretrainingData, MaskedImages
from data2vec.data.multi.batch import MultiBatch
from data2vec.data.multi.masks import block_masks, random_masks
from data2vec.model.multi.mask_plan import plan_masks

LEAST_AREA = 0.2  # of a picture that a crop shows, as MAE


class VisibleImages(MaskedImages):
    """A split's pictures; crops and masks follow from (seed, epoch, index)."""

    def __init__(self, folder, config: DictConfig):
        super().__init__(folder, config)
        self.masks, self.options = config.model.clone_batch, config.model.modalities.image

    @property
    def window(self) -> tuple[int, int]:
        side = self.options.input_size // self.options.patch_size
        return side, side

    def augmentation(self) -> Compose:
        crop = RandomResizedCrop(self.size, (LEAST_AREA, 1.0), interpolation=InterpolationMode.BICUBIC)
        return Compose([crop, RandomHorizontalFlip()])

    def check(self) -> None:
        """The configuration's check has made sure that something is hidden and something visible."""

    def hidden(self, index: int, epoch: int) -> np.ndarray:
        """bool [M, P], True at hidden patches."""
        own, (side, _) = self.options, self.window
        rng = np.random.default_rng(mix_seed(self.seed, epoch, index, 1))
        if own.mask_length == 1:
            return random_masks(side * side, self.masks, own.mask_prob, rng)
        block = (own.mask_length, rng, own.inverse_mask, own.mask_prob_adjust, own.mask_dropout)
        return block_masks(side, self.masks, own.mask_prob, *block)

    def collate(self, indices: np.ndarray, epoch: int) -> MultiBatch:
        count, patches = len(indices), self.window[0] * self.window[1]
        images = torch.empty(count, 3, self.size, self.size, dtype=torch.uint8)
        hidden = torch.empty(count, self.masks, patches, dtype=torch.bool)
        for row, index in enumerate(indices.tolist()):
            images[row] = self.image(index, epoch)
            hidden[row] = torch.from_numpy(self.hidden(index, epoch))
        return MultiBatch(
            torch.from_numpy(np.asarray(indices)),
            images,
            plan_masks(hidden) if count else None,
            [self.files[index] for index in indices.tolist()],
            count * patches,
        )


class MultiImageData(ImagePretrainingData):
    """`ImagePretrainingData` of data2vec 2.0."""

    samples = VisibleImages
