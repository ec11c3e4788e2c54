"""Masked patches filled with the training patch whose target is nearest to the prediction; a figure of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.run import figures
from data2vec.data.image_data import MaskedImages, Normalize
from data2vec.data.multi.batch import MultiBatch

POOL_PICTURES, BATCH = 512, 128


class PatchPool:
    """Patches of training pictures, whole ones, with the teacher's targets for them."""

    @torch.no_grad()
    def __init__(self, model: nn.Module, pictures: MaskedImages, normalize: Normalize):
        self.size = model.patch_size
        targets, pixels = [], []
        chosen = np.linspace(0, len(pictures) - 1, min(POOL_PICTURES, len(pictures))).astype(int)
        for start in range(0, len(chosen), BATCH):
            images = torch.stack([pictures.image(i, epoch=1) for i in chosen[start : start + BATCH].tolist()])
            targets.append(model.patch_targets(normalize(images)).flatten(0, 1))  # uint8 [B, 3, S, S] -> [B * P, C]
            pixels.append(cut(images, self.size).flatten(0, 1))
        self.targets, self.pixels = torch.cat(targets), torch.cat(pixels)  # fp32 [M, C], uint8 [M, 3, p, p]

    def nearest(self, pred: Tensor) -> Tensor:
        """uint8 [N, 3, p, p]: the pixels of the patch nearest to each prediction [N, C], both sides centred."""
        mean = self.targets.mean(dim=0)
        scores = F.normalize(pred - pred.mean(dim=0), dim=1) @ F.normalize(self.targets - mean, dim=1).T  # [N, M]
        return self.pixels[scores.argmax(dim=1)]


def cut(images: Tensor, size: int) -> Tensor:
    """[B, 3, S, S] -> [B, P, 3, size, size], patches row by row."""
    return images.unfold(2, size, size).unfold(3, size, size).permute(0, 2, 3, 1, 4, 5).flatten(1, 2)


def paste(patches: Tensor) -> Tensor:
    """The inverse of `cut`."""
    side = round(patches.shape[1] ** 0.5)
    return patches.unflatten(1, (side, side)).permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)


@torch.no_grad()
def fill_masked(forward: Callable, model: nn.Module, batch: Any, pool: PatchPool) -> tuple[Tensor, Tensor, Tensor]:
    """(pictures uint8 [B, 3, S, S], bool [B, P] where a patch is masked, pictures with what the model expects there).

    Args:
        forward: `modality.forward_of` the run.
        batch: of either version; of several masks a picture the first one counts.
    """
    pred = forward(model, batch)["pred"]
    if isinstance(batch, MultiBatch):
        patches = cut(batch.source, pool.size)
        row, place = batch.plan.hidden // patches.shape[1], batch.plan.hidden % patches.shape[1]
        first = row % batch.plan.masks == 0
        pred, images = pred[first], batch.source
        mask = torch.zeros(patches.shape[:2], dtype=torch.bool)
        mask[row[first] // batch.plan.masks, place[first]] = True
    else:
        images, mask = batch.images, batch.mask
    patches = cut(images, pool.size).clone()
    patches[mask] = pool.nearest(pred)
    return images, mask, paste(patches)


def draw(images: Tensor, mask: Tensor, filled: list[Tensor], path: Path) -> None:
    """Four rows: pictures, masked, filled by the untrained model and by the trained one; as of `fill_masked`."""
    side = round(mask.shape[1] ** 0.5)
    hidden = F.interpolate(mask.view(-1, 1, side, side).float(), images.shape[-2:]).bool()
    rows = [images, images.masked_fill(hidden, 128), *filled]
    pictures = [list(row.permute(0, 2, 3, 1).numpy()) for row in rows]
    figures.picture_rows(pictures, ("picture", "masked", "untrained fills", "trained fills"), path)
