"""Two-view augmentation of pretraining (reference `datasets.DataAugmentationForBEiT`), bit for bit, from less work.

Jitter, flip and crop are drawn first and applied after. Brightness, contrast and saturation act on single pixels (but
for contrast's mean brightness, which is taken over the whole picture), so they commute with the crop: only the pixels
that survive it are touched. When both views have one size and one interpolation they are one picture.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageStat

INTERPOLATIONS = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)  # torchvision's numbers; hue is never changed


@dataclass(frozen=True)
class Draw:
    """What was drawn for one picture.

    Attributes:
        jitter_order: order of the four colour operations.
        factors: brightness, contrast, saturation.
        flip: mirrored left to right, before the crop.
        crop: (top, left, height, width) in the flipped picture.
        interpolation: of the first view.
    """

    jitter_order: tuple[int, ...]
    factors: tuple[float, float, float]
    flip: bool
    crop: tuple[int, int, int, int]
    interpolation: Image.Resampling


@dataclass(frozen=True)
class TwoViewTransform:
    """Jitter, flip, random resized crop; one crop resized for the model and for the tokenizer.

    Attributes:
        input_size, second_input_size: pixels of a view's side.
        interpolation: "bilinear", "bicubic", "lanczos", or "random" (bilinear or bicubic for each picture).
        second_interpolation: of the tokenizer's view.
        min_crop_scale: smallest share of the area a crop takes.
        jitter: strength of brightness, contrast and saturation.
    """

    input_size: int
    second_input_size: int
    interpolation: str = "bicubic"
    second_interpolation: str = "lanczos"
    min_crop_scale: float = 0.08
    jitter: float = 0.4

    @property
    def one_view(self) -> bool:
        """Whether both views are always the same picture."""
        return self.input_size == self.second_input_size and self.interpolation == self.second_interpolation

    def draw(self, size: tuple[int, int], rng: random.Random) -> Draw:
        """Draws for a picture of (width, height)."""
        order, factors = draw_jitter(self.jitter, rng)
        flip = rng.random() < 0.5
        crop = random_crop(size, (self.min_crop_scale, 1.0), rng)
        name = rng.choice(("bilinear", "bicubic")) if self.interpolation == "random" else self.interpolation
        return Draw(order, factors, flip, crop, INTERPOLATIONS[name])

    def apply(self, image: Image.Image, draw: Draw) -> tuple[torch.Tensor, torch.Tensor | None]:
        """An RGB picture -> the model's view, uint8 [S, S, 3], and the tokenizer's; None when it is the same."""
        top, left, height, width = draw.crop
        if draw.flip:
            left = image.width - left - width
        box = (left, top, left + width, top + height)
        crop = jitter_crop(image, box, draw.jitter_order, draw.factors)
        if draw.flip:
            crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        first = to_uint8(crop.resize((self.input_size, self.input_size), draw.interpolation))
        second_interpolation = INTERPOLATIONS[self.second_interpolation]
        if self.input_size == self.second_input_size and draw.interpolation == second_interpolation:
            return first, None if self.one_view else first.clone()
        return first, to_uint8(crop.resize((self.second_input_size, self.second_input_size), second_interpolation))


def draw_jitter(strength: float, rng: random.Random) -> tuple[tuple[int, ...], tuple[float, float, float]]:
    """The order of the colour operations, and the factors of brightness, contrast and saturation."""
    order = tuple(rng.sample(range(4), 4))
    low, high = max(0.0, 1 - strength), 1 + strength
    return order, (rng.uniform(low, high), rng.uniform(low, high), rng.uniform(low, high))


def random_crop(size: tuple[int, int], scale: tuple[float, float], rng: random.Random) -> tuple[int, int, int, int]:
    """A box (top, left, height, width) of `scale` of the area of a (width, height) picture, aspect 3/4 to 4/3.

    After ten draws that do not fit: the largest centred box of a permitted aspect.
    """
    width, height = size
    ratios = (3 / 4, 4 / 3)
    for _ in range(10):
        area = rng.uniform(*scale) * width * height
        aspect = math.exp(rng.uniform(math.log(ratios[0]), math.log(ratios[1])))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return rng.randint(0, height - h), rng.randint(0, width - w), h, w
    w = min(width, round(height * ratios[1]))
    h = min(height, round(width / ratios[0]))
    return (height - h) // 2, (width - w) // 2, h, w


def jitter_crop(
    image: Image.Image, box: tuple[int, int, int, int], order: tuple[int, ...], factors: tuple[float, float, float]
) -> Image.Image:
    """The box of the jittered picture. The whole picture is touched only up to contrast's mean, if at all."""
    operations = [operation for operation in order if operation != HUE]
    before = operations[: operations.index(CONTRAST)]
    whole = image
    for operation in before:
        whole = _enhance(whole, operation, factors)
    mean = int(ImageStat.Stat(whole.convert("L")).mean[0] + 0.5)  # as in PIL's ImageEnhance.Contrast
    crop = whole.crop(box)
    crop = _blend_with_grey(crop, mean, factors[CONTRAST])
    for operation in operations[len(before) + 1 :]:
        crop = _enhance(crop, operation, factors)
    return crop


def _enhance(image: Image.Image, operation: int, factors: tuple[float, float, float]) -> Image.Image:
    if operation == BRIGHTNESS:
        return _blend_with_grey(image, 0, factors[BRIGHTNESS])
    return ImageEnhance.Color(image).enhance(factors[SATURATION])


def _blend_with_grey(image: Image.Image, grey: int, factor: float) -> Image.Image:
    """PIL's `Image.blend` of a constant picture and this one, as a table of 256 values."""
    values = np.arange(256, dtype=np.float32)
    blended = np.float32(grey) + np.float32(factor) * (values - np.float32(grey))
    table = np.clip(blended, 0, 255).astype(np.uint8)  # C's cast: towards zero
    return image.point(table.tolist() * 3)


def to_uint8(image: Image.Image) -> torch.Tensor:
    """uint8 [H, W, 3] with memory of its own."""
    return torch.from_numpy(np.array(image))
