"""Pretraining pictures: found, decoded once, augmented, masked and batched, all from (seed, epoch, index)."""

from __future__ import annotations

import argparse
import os
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch.utils.data import DataLoader, Dataset

from beit2.masking import MaskingGenerator
from beit2.transforms import TwoViewTransform
from common.device import mix_seed
from common.distributed import World
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


class EpochBatches:
    """Batch sampler over all epochs from a given batch on: lists of (epoch, index) for one rank.

    Every epoch is a permutation drawn from (seed, epoch); rank r takes every size-th entry of its first
    batches_per_epoch * batch_size * size. So a resumed run sees what the first would have seen, in any number of loader
    workers, and no epoch has more batches than the schedules know of (the reference's last one can).
    """

    def __init__(
        self,
        count: int,
        batch_size: int,
        world: World,
        batches_per_epoch: int,
        seed: int,
        start: int,
        stop: int,
    ):
        self.count, self.batch_size, self.rank, self.size = count, batch_size, world.rank, world.size
        self.batches_per_epoch, self.seed, self.start, self.stop = batches_per_epoch, seed, start, stop

    def __len__(self) -> int:
        return max(0, self.stop - self.start)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        order, drawn = [], -1
        for number in range(self.start, self.stop):
            epoch, batch = divmod(number, self.batches_per_epoch)
            if epoch != drawn:
                order, drawn = self._order(epoch), epoch
            yield [(epoch, i) for i in order[batch * self.batch_size : (batch + 1) * self.batch_size]]

    def _order(self, epoch: int) -> list[int]:
        generator = torch.Generator().manual_seed(mix_seed(self.seed, epoch))
        return torch.randperm(self.count, generator=generator)[self.rank :: self.size].tolist()


def steps_per_epoch(count: int, batch_size: int, size: int, update_freq: int = 1) -> int:
    """Optimizer steps of an epoch; what does not fill a step is left out.

    Raises:
        UsageError: not even one step.
    """
    samples = batch_size * size * update_freq
    if count < samples:
        raise UsageError(
            f"{count} pictures are fewer than one step takes: --batch_size {batch_size} x {size} ranks x "
            f"--update_freq {update_freq} = {samples}"
        )
    return count // samples


def run_batches(
    dataset: Dataset, options: argparse.Namespace, world: World, steps: int, start: int, stop: int, collate_fn=None
) -> Iterator:
    """Micro-batches of this rank from optimizer step `start` to `stop`, epochs having `steps` of them.

    One loader for the whole run: its workers live through all epochs and fetch across their borders.
    """
    count = options.update_freq
    limits = (start * count, stop * count)
    sampler = EpochBatches(len(dataset), options.batch_size, world, steps * count, options.seed, *limits)
    workers = {"persistent_workers": True, "prefetch_factor": 4} if options.num_workers > 0 else {}
    loader = DataLoader(
        dataset,
        batch_sampler=sampler,
        num_workers=options.num_workers,
        pin_memory=options.pin_mem and world.device.type != "cpu",
        collate_fn=collate_fn,
        **workers,
    )
    return iter(loader)


class Normalizer:
    """uint8 pictures to what model and tokenizer take, on the device."""

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...], device: torch.device):
        self.device = device
        self.mean = torch.tensor(mean, device=device).view(3, 1, 1)
        self.std = torch.tensor(std, device=device).view(3, 1, 1)

    def unit(self, pictures: torch.Tensor) -> torch.Tensor:
        """uint8 [B, H, W, 3] -> fp32 [B, 3, H, W] in [0, 1] on the device."""
        pictures = pictures.to(self.device, non_blocking=True).permute(0, 3, 1, 2)
        return pictures.contiguous().float() / 255

    def __call__(self, unit: torch.Tensor) -> torch.Tensor:
        """[0, 1] -> normalised."""
        return (unit - self.mean) / self.std

    def views(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """The model's pictures, normalised, and the tokenizer's, in [0, 1]."""
        unit = self.unit(batch.views)
        return self(unit), unit if batch.second_views is None else self.unit(batch.second_views)
