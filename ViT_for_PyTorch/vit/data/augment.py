"""From decoded pictures to model input: MAE's fine-tuning augmentation, the evaluation crop, and the device's share.

The loader's workers make uint8 pictures; `to_model_input` normalises and erases the batch on the device. Every draw
comes from the sample's own seed, so a picture's augmentation depends neither on the worker nor on the rank.
"""

from __future__ import annotations

import functools
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN as MEAN
from timm.data import IMAGENET_DEFAULT_STD as STD
from timm.data import auto_augment as timm_auto_augment
from torch import Tensor

from common.data.pictures import to_rgb
from common.data.posterize_repair import repair_posterize
from common.data.shears import use_fast_shears
from vit.model.vision_transformer import ViTConfig

CROP_RATIO = (3 / 4, 4 / 3)  # width / height of a random crop
ERASE_AREA = (0.02, 1 / 3)  # of the picture
ERASE_RATIO = (0.3, 1 / 0.3)
ATTEMPTS = 10  # draws of a box before giving up, in both
RESIZE_FOR_224 = 256  # shorter side before the 224 centre crop

INTERPOLATIONS = {name: getattr(Image.Resampling, name.upper()) for name in ("bicubic", "bilinear", "nearest")}

Box = tuple[int, int, int, int]  # top, left, height, width


@dataclass
class Augmentation:
    """How training pictures are varied, with MAE's fine-tuning values; the one description of it.

    Attributes:
        min_crop_scale: smallest share of the picture that a crop keeps.
        horizontal_flip: probability of a flip.
        auto_augment: timm's RandAugment text; "" for none.
        random_erasing: probability of erasing a box.
        mixup, cutmix: Beta parameters; 0 turns one off.
        mixup_prob, mixup_switch_prob: how often a batch is mixed, and how often by CutMix where both are on.
        label_smoothing: share of a target that is spread over all classes.
    """

    min_crop_scale: float = 0.08
    horizontal_flip: float = 0.5
    auto_augment: str = "rand-m9-mstd0.5-inc1"
    random_erasing: float = 0.25
    mixup: float = 0.8
    cutmix: float = 1.0
    mixup_prob: float = 1.0
    mixup_switch_prob: float = 0.5
    label_smoothing: float = 0.1


class TrainTransform:
    """Random resized crop (bicubic), flip, RandAugment: MAE's fine-tuning recipe as timm's `create_transform` does it.

    Args:
        size: side of the result in pixels.
        options: what to do. The box to erase is drawn here, `to_model_input` fills it; mixing is done on batches.
    """

    def __init__(self, size: int = 224, options: Augmentation | None = None):
        self.size, self.options = size, options or Augmentation()
        self.auto_augment = None
        if self.options.auto_augment:
            fill = tuple(min(255, round(255 * channel)) for channel in MEAN)
            settings = {"translate_const": int(size * 0.45), "img_mean": fill, "interpolation": Image.BICUBIC}
            self.auto_augment = rand_augment(self.options.auto_augment, settings)

    def __call__(self, pixels: np.ndarray, seed: int) -> tuple[np.ndarray, Box | None]:
        """uint8 [H, W, 3] to uint8 [size, size, 3] and the box to erase, both a function of (pixels, seed).

        Seeds Python's and NumPy's global generators, which timm's RandAugment draws from.
        """
        random.seed(seed)
        np.random.seed(seed % 2**32)
        top, left, height, width = random_crop(*pixels.shape[:2], (self.options.min_crop_scale, 1.0), CROP_RATIO)
        image = Image.fromarray(resize(pixels[top : top + height, left : left + width], self.size))
        if random.random() < self.options.horizontal_flip:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)  # ten times as fast as in NumPy
        if self.auto_augment is not None:
            image = self.auto_augment(image)
        return np.asarray(image), random_erasing_box(self.size, self.options.random_erasing)  # [S, S, 3]


def rand_augment(text: str, settings: dict[str, Any]) -> timm_auto_augment.RandAugment:
    """timm's RandAugment, with a posterize that also keeps 0 bits and fast shears."""
    repair_posterize()
    use_fast_shears()
    return timm_auto_augment.rand_augment_transform(text, settings)


class EvalTransform:
    """Resize of the shorter side, then the centre crop, as torchvision's Resize + CenterCrop on PIL pictures.

    Args:
        size: side of the crop in pixels.
        resize_to: shorter side before the crop; None = 256 / 224 x size.
        interpolation: one of INTERPOLATIONS.
    """

    def __init__(self, size: int = 224, resize_to: int | None = None, interpolation: str = "bicubic"):
        self.size, self.filter = size, INTERPOLATIONS[interpolation]
        self.resize_to = resize_to if resize_to is not None else round(RESIZE_FOR_224 * size / 224)
        if self.resize_to < size:
            raise ValueError(f"resize_to {self.resize_to} is smaller than the crop of {size} pixels")

    @classmethod
    def of(cls, model: ViTConfig) -> EvalTransform:
        """What a model's pictures go through in evaluation and prediction alike."""
        return cls(model.image_size, round(model.image_size / model.crop_ratio), model.interpolation)

    def __call__(self, image: Image.Image | np.ndarray) -> np.ndarray:
        """A PIL picture of any mode, or uint8 [H, W, 3], to uint8 [size, size, 3]."""
        image = Image.fromarray(image) if isinstance(image, np.ndarray) else to_rgb(image)
        width, height = image.size
        short = min(width, height)
        new_width, new_height = (int(self.resize_to * side / short) for side in (width, height))
        left, top = round((new_width - self.size) / 2), round((new_height - self.size) / 2)
        # Not in one call with resize(box=...): its rounding moves a few values by a grey level.
        resized = image.resize((new_width, new_height), self.filter)
        return np.asarray(resized.crop((left, top, left + self.size, top + self.size)))  # [S, S, 3]


def random_crop(height: int, width: int, scale: tuple[float, float], ratio: tuple[float, float]) -> Box:
    """A box of random area and aspect: the draws of timm's RandomResizedCropAndInterpolation, in its order."""
    for _ in range(ATTEMPTS):
        area = random.uniform(*scale) * height * width
        aspect = math.exp(random.uniform(math.log(ratio[0]), math.log(ratio[1])))
        crop_width, crop_height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < crop_width <= width and 0 < crop_height <= height:
            top = random.randint(0, height - crop_height)
            left = random.randint(0, width - crop_width)
            return top, left, crop_height, crop_width
    # the largest centred box of an allowed aspect
    crop_width = min(width, max(1, round(height * ratio[1])))
    crop_height = min(height, max(1, round(width / ratio[0])))
    return (height - crop_height) // 2, (width - crop_width) // 2, crop_height, crop_width


def resize(pixels: np.ndarray, size: int) -> np.ndarray:
    """uint8 [H, W, 3] to [size, size, 3], bicubic with antialiasing.

    torch's kernel for interleaved uint8 is vectorised. It rounds its weights a little differently from PIL's: about one
    value in 200 differs by one grey level, one in 100,000 by two.
    """
    batch = torch.from_numpy(np.ascontiguousarray(pixels))[None].permute(0, 3, 1, 2)  # [1, 3, H, W], channels last
    batch = F.interpolate(batch, (size, size), mode="bicubic", antialias=True)  # [1, 3, S, S]
    return np.ascontiguousarray(batch[0].permute(1, 2, 0).numpy())  # [S, S, 3]


def random_erasing_box(size: int, probability: float) -> Box | None:
    """The box timm's RandomErasing would erase in a size x size picture, or None: its draws, in its order."""
    if random.random() > probability:
        return None
    for _ in range(ATTEMPTS):
        area = random.uniform(*ERASE_AREA) * size * size
        aspect = math.exp(random.uniform(math.log(ERASE_RATIO[0]), math.log(ERASE_RATIO[1])))
        height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if height < size and width < size:
            return random.randint(0, size - height), random.randint(0, size - width), height, width
    return None


@dataclass(frozen=True)
class Erasure:
    """A box of one picture of a batch to fill with noise drawn from `seed`."""

    row: int
    box: Box
    seed: int


def normalise(images: Tensor, mean: Sequence[float] = MEAN, std: Sequence[float] = STD) -> Tensor:
    """uint8 [B, 3, H, W] to float32 of zero mean and unit deviation, on the images' device."""
    scale, shift = _scale_and_shift(tuple(mean), tuple(std), images.device)
    images = images.to(torch.float32, memory_format=torch.contiguous_format)  # [B, 3, H, W]
    return images.mul_(scale).add_(shift)


@functools.lru_cache
def _scale_and_shift(mean: tuple[float, ...], std: tuple[float, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """[1, 3, 1, 1] each. Kept: bringing them to an accelerator anew would make the host wait for it at every batch."""
    scale = torch.tensor([1 / (255 * s) for s in std], device=device)
    shift = torch.tensor([-m / s for m, s in zip(mean, std, strict=True)], device=device)
    return scale.view(1, 3, 1, 1), shift.view(1, 3, 1, 1)


def erase(images: Tensor, erasures: Sequence[Erasure]) -> Tensor:
    """Fills boxes of normalised images [B, 3, H, W] with unit normal noise, in place: RandomErasing's "pixel" mode.

    The noise is a function of each erasure's seed and of the kind of device.
    """
    generator = torch.Generator(device=images.device)
    for item in erasures:
        top, left, height, width = item.box
        generator.manual_seed(item.seed)
        images[item.row, :, top : top + height, left : left + width].normal_(generator=generator)
    return images
