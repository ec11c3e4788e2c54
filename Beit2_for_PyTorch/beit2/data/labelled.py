"""Pictures with classes, and tokenizer pictures: fine-tuning, linear probe and VQ-KD training."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from beit2.data.listing import EXTENSIONS, list_pictures
from beit2.data.picture_list import PictureList
from beit2.data.reading import read_image
from beit2.data.transforms import INTERPOLATIONS, draw_jitter, jitter_crop, random_crop, to_uint8
from common.device import mix_seed
from common.errors import UsageError

Transform = Callable[[Image.Image, int], torch.Tensor]  # picture, seed -> tensor


def find_classes(
    root: str | Path, names: list[str] | None = None, option: str = "--data_path"
) -> tuple[PictureList, np.ndarray, list[str]]:
    """Pictures of root/<class>/**, their class numbers int64, and the class names in sorted order.

    Args:
        names: classes of the training set; a class of another name is then an error.
        option: where the folder was given, for messages.

    Raises:
        UsageError: no folder, no class, no picture, an unknown class, or train/ and val/ in the place of classes.
    """
    paths = list_pictures(root, option, labelled=True)
    counts = paths.counts_by_folder()
    loose = [path for path in counts if path.lower().endswith(EXTENSIONS)]
    if loose:
        raise UsageError(f"{option} {root}: {loose[0]} lies beside the class folders: move it into one, or away")
    names = list(counts) if names is None else names
    unknown = sorted(set(counts) - set(names))
    if unknown:
        raise UsageError(f"{option} {root}: class folder {unknown[0]} does not exist in the training set")
    number = {name: index for index, name in enumerate(names)}
    labels = np.repeat([number[name] for name in counts], list(counts.values()))  # [pictures]
    return paths, labels, names


class LabelledImages(Dataset):
    """Item (epoch, index) or index -> (tensor, class)."""

    def __init__(self, paths: Sequence[Path], labels: Sequence[int], transform: Transform, seed: int = 0):
        self.paths, self.labels, self.transform, self.seed = paths, labels, transform, seed

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, key: int | tuple[int, int]) -> tuple[torch.Tensor, int]:
        epoch, index = key if isinstance(key, tuple) else (0, key)
        image = read_image(self.paths[index])
        return self.transform(image, mix_seed(self.seed, epoch, index)), int(self.labels[index])


class CropAndFlip:
    """Random resized crop and flip, of the jittered picture where `jitter` is above 0: uint8 [S, S, 3]."""

    def __init__(self, size: int, min_scale: float, interpolation: str = "bicubic", jitter: float = 0.0):
        self.size, self.min_scale, self.interpolation, self.jitter = size, min_scale, interpolation, jitter

    def __call__(self, image: Image.Image, seed: int) -> torch.Tensor:
        rng = random.Random(seed)
        jitter = draw_jitter(self.jitter, rng) if self.jitter > 0 else None
        top, left, height, width = random_crop(image.size, (self.min_scale, 1.0), rng)
        name = rng.choice(("bilinear", "bicubic")) if self.interpolation == "random" else self.interpolation
        box = (left, top, left + width, top + height)
        crop = image.crop(box) if jitter is None else jitter_crop(image, box, *jitter)
        image = crop.resize((self.size, self.size), INTERPOLATIONS[name])
        if rng.random() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return to_uint8(image)


class CentreCrop:
    """Evaluation: the shorter side to size / crop_pct, then the middle. uint8 [S, S, 3].

    The pixels are those of torchvision's Resize and CenterCrop. crop_pct defaults to 224 / 256, from 384 pixels on to
    1.
    """

    def __init__(self, size: int, crop_pct: float | None = None, interpolation: str = "bicubic"):
        self.size = size
        self.shorter = int(size / (crop_pct or (224 / 256 if size < 384 else 1.0)))
        self.interpolation = INTERPOLATIONS["bicubic" if interpolation == "random" else interpolation]

    def __call__(self, image: Image.Image, seed: int = 0) -> torch.Tensor:
        width, height = (int(self.shorter * side / min(image.size)) for side in image.size)
        image = image.resize((width, height), self.interpolation)
        left, top = round((width - self.size) / 2), round((height - self.size) / 2)
        return to_uint8(image.crop((left, top, left + self.size, top + self.size)))


class TimmTransform:
    """timm's training augmentation (RandAugment, random erasing), its global generators seeded for every picture."""

    def __init__(self, transform: Callable[[Image.Image], torch.Tensor]):
        self.transform = transform

    def __call__(self, image: Image.Image, seed: int) -> torch.Tensor:
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.manual_seed(seed)
        return self.transform(image)
