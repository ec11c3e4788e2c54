"""Mixup and CutMix on whole batches on the device (timm 0.3.2, batch mode, as MAE and MindFormers use it).

What is drawn comes from (seed, step, rank) on the host, so nothing waits for the device and a resumed run draws the
same. Each picture is paired with the one at the mirrored place of the batch: `images.flip(0)`.
"""

from dataclasses import dataclass

import numpy as np
from timm.data.mixup import mixup_target
from torch import Tensor

from common.device import mix_seed
from vit.data.augment import Augmentation

Box = tuple[int, int, int, int]  # y low, y high, x low, x high


@dataclass(frozen=True)
class Mix:
    """One draw: `lam` = share of the own picture; `box` = region taken from the partner (CutMix) or None (mixup)."""

    lam: float = 1.0
    box: Box | None = None


def cutmix_box(height: int, width: int, lam: float, centre_y: int, centre_x: int) -> tuple[Box, float]:
    """The box of area share 1 - lam around a centre, clipped to the picture, and the lam it really leaves.

    Half the side goes to each direction as in timm 0.3.2; later timm makes boxes of odd side one pixel larger.
    """
    side = (1.0 - lam) ** 0.5
    half_y, half_x = int(height * side) // 2, int(width * side) // 2
    top, bottom = max(centre_y - half_y, 0), min(centre_y + half_y, height)
    left, right = max(centre_x - half_x, 0), min(centre_x + half_x, width)
    return (top, bottom, left, right), 1.0 - (bottom - top) * (right - left) / (height * width)


def draw_mix(options: Augmentation, height: int, width: int, *, seed: int, step: int, rank: int) -> Mix:
    """The mix of one batch. `step` counts micro-batches where gradients are accumulated."""
    rng = np.random.default_rng(mix_seed(seed, step, rank))
    mix_at, switch_at = rng.random(), rng.random()
    if (options.mixup <= 0 and options.cutmix <= 0) or mix_at >= options.mixup_prob:
        return Mix()
    if options.cutmix > 0 and (options.mixup <= 0 or switch_at < options.mixup_switch_prob):
        lam = float(rng.beta(options.cutmix, options.cutmix))
        box, lam = cutmix_box(height, width, lam, int(rng.integers(height)), int(rng.integers(width)))
        return Mix(lam, box)
    return Mix(float(rng.beta(options.mixup, options.mixup)))


def apply_mix(images: Tensor, target: Tensor, mix: Mix, num_classes: int, smoothing: float) -> tuple[Tensor, Tensor]:
    """Mixed images [B, 3, H, W] (float, changed in place) and soft targets [B, num_classes] from class indices [B].

    An odd batch's middle picture meets itself and stays as it is.
    """
    if mix.box is not None:
        top, bottom, left, right = mix.box
        images[:, :, top:bottom, left:right] = images[:, :, top:bottom, left:right].flip(0)
    elif mix.lam < 1.0:
        partner = images.flip(0).mul_(1.0 - mix.lam)
        images.mul_(mix.lam).add_(partner)
    return images, mixup_target(target, num_classes, mix.lam, smoothing)
