"""Pictures with classes, and tokenizer pictures: fine-tuning, linear probe and VQ-KD training."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from beit2.image_data import EXTENSIONS, read_image
from beit2.transforms import INTERPOLATIONS, random_crop, to_uint8
from common.device import UsageError, mix_seed

Transform = Callable[[Image.Image, int], torch.Tensor]  # picture, seed -> tensor


def find_classes(root: str | Path, names: list[str] | None = None) -> tuple[list[Path], list[int], list[str]]:
    """Pictures of root/<class>/**, their class numbers, and the class names in sorted order.

    Args:
        names: classes of the training set; a class of another name is then an error.

    Raises:
        UsageError: no folder, no class, no picture, or an unknown class.
    """
    root = Path(root)
    if not root.is_dir():
        raise UsageError(f"{root}: no such folder")
    found = sorted(entry.name for entry in root.iterdir() if entry.is_dir())
    if not found:
        raise UsageError(f"{root}: no class folders in it")
    names = found if names is None else names
    unknown = sorted(set(found) - set(names))
    if unknown:
        raise UsageError(f"{root}: class folder {unknown[0]} does not exist in the training set")
    paths, labels = [], []
    for name in found:
        for path in sorted((root / name).rglob("*")):
            if path.suffix.lower() in EXTENSIONS:
                paths.append(path)
                labels.append(names.index(name))
    if not paths:
        raise UsageError(f"{root}: no pictures in its class folders (looked for {' '.join(EXTENSIONS)})")
    return paths, labels, names


class LabelledImages(Dataset):
    """Item (epoch, index) or index -> (tensor, class)."""

    def __init__(self, paths: list[Path], labels: list[int], transform: Transform, seed: int = 0):
        self.paths, self.labels, self.transform, self.seed = paths, labels, transform, seed

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, key: int | tuple[int, int]) -> tuple[torch.Tensor, int]:
        epoch, index = key if isinstance(key, tuple) else (0, key)
        image = read_image(self.paths[index])
        return self.transform(image, mix_seed(self.seed, epoch, index)), self.labels[index]


class CropAndFlip:
    """Random resized crop and flip, with optional colour jitter before: uint8 [S, S, 3]."""

    def __init__(self, size: int, min_scale: float, interpolation: str = "bicubic", jitter: float = 0.0):
        self.size, self.min_scale, self.interpolation, self.jitter = size, min_scale, interpolation, jitter

    def __call__(self, image: Image.Image, seed: int) -> torch.Tensor:
        rng = random.Random(seed)
        if self.jitter > 0:
            from torchvision.transforms import functional as tf

            for operation in (tf.adjust_brightness, tf.adjust_contrast, tf.adjust_saturation):
                image = operation(image, rng.uniform(max(0.0, 1 - self.jitter), 1 + self.jitter))
        top, left, height, width = random_crop(image.size, (self.min_scale, 1.0), rng)
        name = rng.choice(("bilinear", "bicubic")) if self.interpolation == "random" else self.interpolation
        box = (left, top, left + width, top + height)
        image = image.crop(box).resize((self.size, self.size), INTERPOLATIONS[name])
        if rng.random() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return to_uint8(image)


class CentreCrop:
    """Evaluation: the shorter side to size / crop_pct, then the middle. uint8 [S, S, 3].

    crop_pct defaults to 224 / 256, and to 1 from 384 pixels on, where the picture is squeezed to the square instead.
    """

    def __init__(self, size: int, crop_pct: float | None = None, interpolation: str = "bicubic"):
        self.size, self.squeeze = size, crop_pct is None and size >= 384
        self.shorter = size if self.squeeze else int(size / (crop_pct or 224 / 256))
        self.interpolation = INTERPOLATIONS["bicubic" if interpolation == "random" else interpolation]

    def __call__(self, image: Image.Image, seed: int = 0) -> torch.Tensor:
        if self.squeeze:
            return to_uint8(image.resize((self.size, self.size), self.interpolation))
        width, height = image.size
        factor = self.shorter / min(width, height)
        width, height = max(self.shorter, int(width * factor)), max(self.shorter, int(height * factor))
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
