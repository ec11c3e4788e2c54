"""What the probes look at for images: mean-pooled patches and the classes of their folders, and masked patches."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from omegaconf import DictConfig
from PIL import Image
from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Resize

from common import device as devices
from common.errors import UsageError
from common.run.progress import bar
from data2vec.data.epochs import BrokenSample, EpochBatches
from data2vec.data.image_data import Normalize, find_pictures, read_picture, to_uint8

BATCH = 128
GRID = 3  # cells a side in which patches are averaged
SIDE = 12  # pixels of the raw-pixel yardstick


@torch.no_grad()
def collect_pictures(
    model: torch.nn.Module, folder: Path, classes: list[str], config: DictConfig, device: torch.device, precision: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """(features fp32 [N, GRID * GRID * C], class indices [N]) of the class folders' pictures.

    They are centre-cropped, and no patch is masked. The patches' states are averaged in a grid of cells, so that what
    stands where is not lost.

    Raises:
        UsageError: a picture in no class folder, or one that cannot be read.
    """
    files, size = find_pictures(folder), config.task.input_size
    names = [Path(file).relative_to(folder).parts[0] for file in files]
    if stray := [file for file, name in zip(files, names, strict=True) if name not in classes]:
        raise UsageError(f"{stray[0]}: a picture outside the class folders of {folder}: move or remove it")
    normalize = Normalize(config, device)
    features = []
    for start in range(0, len(files), BATCH):
        images = read_cropped(files[start : start + BATCH], size).to(device)
        with devices.autocast(device, precision):
            hidden = model.patch_states(normalize(images))  # [B, P, C]
        features.append(pool(hidden.float()).cpu())
    return torch.cat(features), torch.tensor([classes.index(name) for name in names])


def read_cropped(files: list[str], size: int) -> torch.Tensor:
    """uint8 [B, 3, size, size], the middle of each picture. UsageError for one that cannot be read."""
    crop = Compose([Resize(size, interpolation=InterpolationMode.BICUBIC), CenterCrop(size)])
    try:
        return torch.stack([to_uint8(crop(read_picture(file))) for file in files])
    except BrokenSample as error:
        raise UsageError(str(error)) from None


def pool(hidden: torch.Tensor) -> torch.Tensor:
    """Patch states [B, P, C], averaged in GRID x GRID cells: [B, GRID * GRID * C]."""
    side = round(hidden.shape[1] ** 0.5)
    cells = F.adaptive_avg_pool2d(hidden.transpose(1, 2).unflatten(2, (side, side)), GRID)  # [B, C, GRID, GRID]
    return cells.flatten(1)


def collect_pixels(folder: Path) -> torch.Tensor:
    """fp32 [N, 3 * SIDE * SIDE] in 0..1: the same pictures, shrunk by averaging; no features."""
    small = (read_picture(file).resize((SIDE, SIDE), Image.Resampling.BOX) for file in find_pictures(folder))
    return torch.stack([to_uint8(picture).flatten() for picture in small]).float().div(255)


@torch.no_grad()
def collect_masked_patches(
    model: torch.nn.Module, batches: EpochBatches, limit: int, forward, device: torch.device, precision: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """(predictions, targets), fp32 [N, C], of the first `limit` masked patches of a validation split."""
    pred, target = [], []
    for batch in bar(batches.loader(num_workers=0), "probe"):
        with devices.autocast(device, precision):
            out = forward(model, batch.to(device))
        pred.append(out["pred"].cpu())
        target.append(out["target"].cpu())
        if sum(map(len, pred)) >= limit:
            break
    return torch.cat(pred)[:limit], torch.cat(target)[:limit]


def class_folders(config: DictConfig) -> tuple[Path, Path, list[str]]:
    """(training folder, validation folder, class names).

    Raises:
        UsageError: no such folders, or classes that differ.
    """
    root = Path(config.task.data)
    folders = [root / config.dataset.train_subset, root / config.dataset.valid_subset]
    names = []
    for folder in folders:
        if not folder.is_dir():
            raise UsageError(
                f"{folder} does not exist: the probe needs class folders for training and validation "
                "(task.data, dataset.train_subset, dataset.valid_subset)"
            )
        names.append(sorted(entry.name for entry in folder.iterdir() if entry.is_dir()))
    if not names[0] or names[0] != names[1]:
        raise UsageError(f"{folders[0]} and {folders[1]}: the probe needs the same class folders in both")
    return *folders, names[0]
