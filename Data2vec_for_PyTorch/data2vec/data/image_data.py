"""Pictures as batches of augmented images and block masks: fairseq's image_pretraining task, in one place.

Pictures travel as uint8; the model's device normalises them. Augmentation and mask follow from (seed, epoch, index).
"""

from __future__ import annotations

import os
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig
from PIL import Image
from torchvision.transforms import ColorJitter, Compose, InterpolationMode, RandomHorizontalFlip, RandomResizedCrop

from common.data import pictures
from common.device import mix_seed, to_device
from common.errors import UsageError
from common.run.run_folder import listing_identity
from data2vec.data.batching import batch_by_size
from data2vec.data.block_masking import block_mask
from data2vec.data.epochs import BrokenSample, SplitBatches

JITTER = 0.4
PROBED_PICTURES = 64  # whose masks are looked at before training


@dataclass
class ImageBatch:
    """One micro-batch. An empty shard's batch has no rows."""

    id: torch.Tensor  # [B]
    images: torch.Tensor  # uint8 [B, 3, S, S]
    mask: torch.Tensor  # bool [B, P]
    rows: torch.Tensor  # int64 [N], the masked patches' places in B * (1 + P)
    names: list[str]  # files [B]

    @property
    def num_tokens(self) -> int:
        """Patches."""
        return self.mask.numel()

    def to(self, device: torch.device) -> ImageBatch:
        if device.type == "cpu":
            return self
        tensors = (to_device(getattr(self, name), device) for name in ("images", "mask", "rows"))
        return ImageBatch(self.id, *tensors, self.names)


class MaskedImages:
    """A split's pictures, in the order in which fairseq walks folders; class folders or none, links followed."""

    def __init__(self, folder: Path, config: DictConfig):
        self.folder = folder
        self.files = find_pictures(folder)
        self.seed = config.common.seed
        self.size = config.task.input_size
        self.model = config.model
        self.augment = self.augmentation()

    @property
    def window(self) -> tuple[int, int]:
        """(rows, columns) of patches."""
        side = self.model.image_size // self.model.patch_size
        return side, side

    def augmentation(self) -> Compose:
        crop = RandomResizedCrop(self.size, interpolation=InterpolationMode.BICUBIC)
        return Compose([ColorJitter(JITTER, JITTER, JITTER), RandomHorizontalFlip(), crop])

    def __len__(self) -> int:
        return len(self.files)

    def identity(self) -> dict[str, Any]:
        return listing_identity(self.files, root=self.folder)

    def image(self, index: int, epoch: int) -> torch.Tensor:
        """The augmented picture, uint8 [3, S, S]. BrokenSample naming a file that cannot be read."""
        picture = read_picture(self.files[index])
        with torch.random.fork_rng(devices=[]):  # torchvision draws from torch's generator
            torch.default_generator.manual_seed(mix_seed(self.seed, epoch, index))  # the CPU's alone
            return to_uint8(self.augment(picture))

    def mask(self, index: int, epoch: int) -> np.ndarray:
        """bool [P], True at hidden patches."""
        model = self.model
        rng = random.Random(mix_seed(self.seed, epoch, index, 1))
        sizes = (model.num_mask_patches, model.min_mask_patches_per_block, model.max_mask_patches_per_block)
        return block_mask(self.window, *sizes, rng).ravel()

    def check(self) -> None:
        """Looks at the first masks, whether they hide anything. UsageError."""
        probed = min(len(self), PROBED_PICTURES)
        if not any(self.mask(index, epoch=1).any() for index in range(probed)):
            raise UsageError(
                f"{self.folder}: no patch is hidden in its first {probed} pictures: choose other "
                "model.num_mask_patches, min_mask_patches_per_block and max_mask_patches_per_block"
            )

    def collate(self, indices: np.ndarray, epoch: int) -> ImageBatch:
        patches = self.window[0] * self.window[1]
        images = torch.empty(len(indices), 3, self.size, self.size, dtype=torch.uint8)
        mask = torch.zeros(len(indices), patches, dtype=torch.bool)
        for row, index in enumerate(indices.tolist()):
            images[row] = self.image(index, epoch)
            mask[row] = torch.from_numpy(self.mask(index, epoch))
        row, patch = mask.nonzero(as_tuple=True)
        rows = row * (patches + 1) + patch + 1
        files = [self.files[index] for index in indices.tolist()]
        return ImageBatch(torch.from_numpy(np.asarray(indices)), images, mask, rows, files)


class ImagePretrainingData(SplitBatches):
    """Picture folders and batch plans of a run.

    The training split is `task.data/train` where that folder exists, else `task.data` itself.

    Raises:
        UsageError: no such folder, no pictures in it, a missing validation folder, or nothing to train on.
    """

    samples: type[MaskedImages] = MaskedImages  # of a split

    def __init__(self, config: DictConfig, rank: int = 0, world_size: int = 1):
        super().__init__(config, rank, world_size)
        self.folder = Path(config.task.data)
        if not self.folder.is_dir():
            raise UsageError(f"task.data={config.task.data}: no such folder (one with pictures, or train/ with them)")

    def open_split(self, name: str, training: bool, place: int) -> tuple[MaskedImages, list[np.ndarray]]:
        folder = self.folder / name
        if not folder.is_dir():
            if not training:
                raise UsageError(
                    f"split '{name}' of task.data: {folder} does not exist: name the folder with "
                    "dataset.valid_subset=NAME, or train without validation, dataset.disable_validation=true"
                )
            folder = self.folder
        data = self.samples(folder, self.config)
        data.check()
        pictures.check(data.files)
        dataset = self.config.dataset
        rows = dataset.batch_size if training else dataset.batch_size_valid or dataset.batch_size
        order = np.random.RandomState(self.config.common.seed).permutation(len(data))
        batches = batch_by_size(
            order,
            num_tokens_vec=np.ones(len(order)),
            max_sentences=rows,
            required_batch_size_multiple=dataset.required_batch_size_multiple,
        )
        if not batches:
            raise UsageError(
                f"{folder}: {len(data)} pictures make no batch: a last batch that is no multiple of "
                f"dataset.required_batch_size_multiple={dataset.required_batch_size_multiple} is dropped"
            )
        return data, batches


def find_pictures(folder: Path) -> list[str]:
    """By folder, then by name. UsageError where there are none."""
    files = sorted(pictures.find(folder), key=os.path.split)
    if not files:
        raise UsageError(f"{folder}: no pictures ({', '.join(pictures.SUFFIXES)})")
    return files


def read_picture(path: str) -> Image.Image:
    """RGB. BrokenSample when it is no readable picture."""
    try:
        return pictures.read(path)
    except pictures.BrokenPicture as error:
        raise BrokenSample(f"{error}; remove or repair it") from error


def to_uint8(image: Image.Image) -> torch.Tensor:
    """uint8 [3, H, W]."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


class Normalize:
    """uint8 pictures [B, 3, S, S] to what the model takes, on their device."""

    def __init__(self, config: DictConfig, device: torch.device):
        values = (config.task.normalization_mean, config.task.normalization_std)
        self.mean, self.std = (torch.tensor(list(v), device=device).view(3, 1, 1) for v in values)

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        return (images.float() / 255 - self.mean) / self.std
