"""Pictures from anywhere, and what turns them into model input for prediction."""

from __future__ import annotations

import io
import os
import urllib.request
from collections.abc import Sequence
from typing import Any
from urllib.error import URLError

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from common.data.pictures import to_rgb, upright
from vit.data.augment import MEAN, RESIZE_FOR_224, STD, EvalTransform, normalise
from vit.data.image_folder import BrokenImage, read_image
from vit.model.vision_transformer import ViTConfig

URL_STARTS = ("http://", "https://")
URL_TIMEOUT_S, URL_BYTES = 30, 1 << 28
FORMS = "a PIL picture, a path or URL, a uint8 or [0, 1] float array or tensor of 2 to 4 dimensions, or a list of these"


def load_image(source: str | os.PathLike[str] | Image.Image) -> Image.Image:
    """A picture file, http(s) URL or PIL picture as an RGB PIL picture. `BrokenImage` names what cannot be read."""
    if isinstance(source, Image.Image):
        return _decoded(source, getattr(source, "filename", "") or "a PIL picture")
    if not str(source).startswith(URL_STARTS):
        return Image.fromarray(read_image(source))
    try:
        with urllib.request.urlopen(str(source), timeout=URL_TIMEOUT_S) as answer:
            image = Image.open(io.BytesIO(answer.read(URL_BYTES)))
    except (URLError, OSError, ValueError, Image.DecompressionBombError) as error:
        raise BrokenImage(f"{source}: not a readable picture ({error})") from error
    return _decoded(image, str(source))


def _decoded(image: Image.Image, name: str) -> Image.Image:
    try:
        image.load()  # PIL reads the pixels of an opened file only now
        return to_rgb(upright(image))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise BrokenImage(f"{name}: not a readable picture ({error})") from error


def image_list(images: Any) -> list[Any]:
    """One picture or several, in any form `ViTImageProcessor` takes, as a list of single pictures."""
    if isinstance(images, np.ndarray | Tensor) and images.ndim == 4:
        return list(images)
    return list(images) if isinstance(images, list | tuple) else [images]


class ViTImageProcessor:
    """Resize, centre crop and normalisation with ImageNet's mean and deviation, as MindFormers' ViTImageProcessor.

    Args:
        size: side of the crop in pixels.
        resize_to: shorter side before the crop. None = the reference's 256 for crops up to 224 pixels, in proportion
            above (where the reference would pad).
    """

    def __init__(self, size: int = 224, resize_to: int | None = None):
        if resize_to is None and size <= 224:
            resize_to = RESIZE_FOR_224
        self.transform, self.mean, self.std = EvalTransform(size, resize_to), MEAN, STD

    @classmethod
    def of(cls, model: ViTConfig) -> ViTImageProcessor:
        """What evaluation does with the pictures of a model."""
        processor = cls(model.image_size)
        processor.transform, processor.mean, processor.std = EvalTransform.of(model), model.mean, model.std
        return processor

    @property
    def size(self) -> int:
        """Side of the result in pixels."""
        return self.transform.size

    def __call__(self, images: Any) -> Tensor:
        """One picture or several to float32 [B, 3, size, size].

        Takes PIL pictures of any mode, paths, URLs, arrays and tensors ([H, W], [H, W, C], [C, H, W] or a batch of
        these; uint8, or floats from 0 to 1), and lists of them.

        Raises:
            BrokenImage: a file or URL that is no readable picture.
            TypeError, ValueError: something else than the above.
        """
        pixels: Sequence[np.ndarray] = [self.transform(_to_pil(image)) for image in image_list(images)]
        if not pixels:
            raise ValueError("no pictures: the list is empty")
        return normalise(torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2), self.mean, self.std)  # [B, 3, S, S]


def _to_pil(image: Any) -> Image.Image:
    if isinstance(image, str | os.PathLike | Image.Image):
        return load_image(image)
    if isinstance(image, Tensor):
        image = image.detach().cpu().numpy()
    if not isinstance(image, np.ndarray):
        raise TypeError(f"cannot read a picture from {type(image).__name__}; give {FORMS}")
    if image.ndim == 3 and image.shape[0] in (1, 3, 4) and image.shape[2] not in (1, 3, 4):
        image = image.transpose(1, 2, 0)  # [H, W, C]
    if image.ndim == 3 and image.shape[2] == 1:
        image = image[..., 0]
    if image.ndim not in (2, 3) or (image.ndim == 3 and image.shape[2] not in (3, 4)):
        raise ValueError(f"an array of shape {image.shape} is no picture; give {FORMS}")
    if image.dtype != np.uint8:
        if not np.issubdtype(image.dtype, np.floating) or image.min() < 0 or image.max() > 1:
            raise ValueError(f"an array of {image.dtype} from {image.min()} to {image.max()}; give {FORMS}")
        image = (image * 255).round().astype(np.uint8)
    return to_rgb(Image.fromarray(np.ascontiguousarray(image)))
