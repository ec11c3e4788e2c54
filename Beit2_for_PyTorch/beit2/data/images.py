"""Pretraining pictures: found, decoded once, augmented and masked, all from (seed, epoch, index)."""

from __future__ import annotations

import os
import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch.utils.data import Dataset

from beit2.data.masking import MaskingGenerator
from beit2.data.transforms import TwoViewTransform
from common.device import mix_seed
from common.errors import UsageError

EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")


def find_images(root: str | Path, option: str = "--data_path") -> list[Path]:
    """All pictures below a folder, in sorted order. Of a COCO 2017 folder (`train2017/` in it) those of train2017.

    Args:
        option: where the folder was given, for messages.

    Raises:
        UsageError: no such folder, or no picture in it.
    """
    root = Path(root)
    if not root.is_dir():
        raise UsageError(f"{option} {root}: no such folder")
    if (root / "train2017").is_dir():
        root = root / "train2017"
    paths = []
    for folder, subfolders, names in os.walk(root, followlinks=True):
        subfolders.sort()
        paths += [Path(folder, name) for name in sorted(names) if name.lower().endswith(EXTENSIONS)]
    if not paths:
        raise UsageError(f"{option} {root}: no pictures in it (looked for {' '.join(EXTENSIONS)})")
    return paths


def check_images(paths: list[Path], count: int = 200) -> None:
    """Before training: no file is empty, and `count` of them, evenly spread, decode.

    Raises:
        UsageError: naming the file.
    """
    for path in paths:
        if path.stat().st_size == 0:
            raise UsageError(f"{path}: an empty file; remove it or fetch it again")
    for path in paths[:: max(1, len(paths) // count)]:
        try:
            read_image(path)
        except ValueError as error:
            raise UsageError(str(error)) from error


def read_image(path: Path) -> Image.Image:
    """The picture as RGB.

    Raises:
        ValueError: naming the file, when it cannot be decoded. (The reference trains on another picture instead.)
    """
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"{path}: not a readable picture ({error}); remove it or fetch it again") from error


class PretrainingImages(Dataset):
    """Item (epoch, index) -> (view uint8 [S, S, 3], the tokenizer's view or None, mask bool [h, w])."""

    def __init__(self, paths: list[Path], transform: TwoViewTransform, masking: MaskingGenerator, seed: int):
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
