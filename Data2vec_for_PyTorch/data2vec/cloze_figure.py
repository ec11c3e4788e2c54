"""Masked patches filled with the training patch whose target is nearest to the prediction; a figure of it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from data2vec.data.image_data import ImageBatch, MaskedImages, Normalize
from data2vec.model.vision_model import Data2VecVision

POOL_PICTURES, BATCH = 512, 128


class PatchPool:
    """Patches of training pictures, whole ones, with the teacher's targets for them."""

    @torch.no_grad()
    def __init__(self, model: Data2VecVision, pictures: MaskedImages, normalize: Normalize):
        self.size = model.config.patch_size
        targets, pixels = [], []
        chosen = np.linspace(0, len(pictures) - 1, min(POOL_PICTURES, len(pictures))).astype(int)
        for start in range(0, len(chosen), BATCH):
            images = pictures.collate(chosen[start : start + BATCH], epoch=1).images  # uint8 [B, 3, S, S]
            patches = model.patch_embed(normalize(images))  # [B, P, C]
            length = patches.shape[1] + 1
            rows = torch.arange(len(images) * length).view(-1, length)[:, 1:].flatten()  # all but [CLS]
            targets.append(model.make_targets(normalize(images), patches, rows))
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
def fill_masked(model: Data2VecVision, batch: ImageBatch, pool: PatchPool, normalize: Normalize) -> Tensor:
    """uint8 [B, 3, S, S]: the pictures with every masked patch replaced by what the model expects there."""
    pred = model(normalize(batch.images), batch.mask, batch.rows)["pred"]
    patches = cut(batch.images, pool.size).clone()
    patches[batch.mask] = pool.nearest(pred)
    return paste(patches)


def draw(batch: ImageBatch, filled: list[Tensor], path: Path) -> None:
    """Four rows: pictures, masked, filled by the untrained model and by the trained one."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    side = round(batch.mask.shape[1] ** 0.5)
    hidden = F.interpolate(batch.mask.view(-1, 1, side, side).float(), batch.images.shape[-2:]).bool()
    rows = [batch.images, batch.images.masked_fill(hidden, 128), *filled]
    figure, axes = pyplot.subplots(
        len(rows), len(batch.images), figsize=(1.5 * len(batch.images), 6.4), layout="constrained", squeeze=False
    )
    for pictures, title, line in zip(
        rows, ("picture", "masked", "untrained fills", "trained fills"), axes, strict=True
    ):
        for picture, cell in zip(pictures, line, strict=True):
            cell.imshow(picture.permute(1, 2, 0).numpy())
            cell.set(xticks=[], yticks=[])
        line[0].set_ylabel(title)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
