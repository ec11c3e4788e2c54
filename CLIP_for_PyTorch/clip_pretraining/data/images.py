"""Image bytes to a square uint8 tensor: decode, colours, resize, centre crop.

Same pixels as `CLIPImageProcessor` before normalisation (within one level): EXIF orientation is ignored, transparency
is laid on white, the shortest edge becomes `size` by antialiased bicubic, the centre is cut out. Normalisation happens
on the device (`normalise_pixels` of evaluation/encoder.py).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from common.data import pictures

Box = tuple[int, int, int, int]  # left, upper, right, lower
_JPEG_MAGIC = b"\xff\xd8\xff"


ImageError = pictures.BrokenPicture  # a picture that cannot be read; the message names it


def load_image(path: str | Path, size: int, exif_transpose: bool = False) -> torch.Tensor:
    """The picture at `path`, uint8 [3, size, size].

    Args:
        exif_transpose: turn the picture as its EXIF orientation says. Off: as transformers, open_clip, the reference.

    Raises:
        ImageError: missing, truncated, too large or not a picture.
    """
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise ImageError(f"{path}: {error.strerror}") from None
    return decode_image(data, size, str(path), exif_transpose)


def decode_image(
    data: bytes, size: int, name: str, exif_transpose: bool = False, box_of: Callable[[int, int], Box] | None = None
) -> torch.Tensor:
    """As `load_image`, from the bytes of the file; `name` is for the error message.

    `box_of`: (width, height) -> the part of the picture that becomes the square, in place of the centre.
    """
    image = pictures.decode(data, name, turn=exif_transpose, on_white=True, clip_16_bit=True)
    if box_of:
        part = image.crop(box_of(*image.size)).resize((size, size), Image.Resampling.BICUBIC)
        return torch.from_numpy(np.ascontiguousarray(np.asarray(part).transpose(2, 0, 1)))  # [3, S, S]
    resize = resize_only_the_crop if data.startswith(_JPEG_MAGIC) and not exif_transpose else resize_and_crop
    return torch.from_numpy(np.ascontiguousarray(np.asarray(resize(image, size)).transpose(2, 0, 1)))  # [3, S, S]


def resize_and_crop(image: Image.Image, size: int) -> Image.Image:
    """Shortest edge to `size` (the other rounded down), then the centre `size` x `size`: exactly Pillow's pixels."""
    width, height = _resized(image.size, size)
    left, top = (width - size) // 2, (height - size) // 2
    return image.resize((width, height), Image.Resampling.BICUBIC).crop((left, top, left + size, top + size))


def resize_only_the_crop(image: Image.Image, size: int) -> Image.Image:
    """As `resize_and_crop` without resampling what is cut away, a quarter sooner for 4:3.

    Pillow takes the crop in single precision, which moves one pixel in 10,000 of a photograph by one level; edges of
    drawings can move by two, so only JPEGs come here, and none that has to grow gets a box. Columns go first in either
    case: left alone, Pillow begins with the rows of an upright picture, and a fifth of the pixels round otherwise. Of
    one over twice as high as wide it begins with the rows even without a box, so that one gets none.
    """
    if min(image.size) < size or image.height > 2 * image.width:
        return resize_and_crop(image, size)
    width, height = _resized(image.size, size)
    x, y = image.width / width, image.height / height  # source pixels per resized pixel
    left, top = (width - size) // 2 * x, (height - size) // 2 * y
    bottom = min(top + size * y, image.height)
    reach = int(2 * max(y, 1)) + 2  # rows that the bicubic filter sees beyond the crop
    first, last = max(0, int(top) - reach), min(image.height, int(bottom) + 1 + reach)
    columns = (left, first, min(left + size * x, image.width), last)
    narrow = image.resize((size, last - first), Image.Resampling.BICUBIC, box=columns)
    return narrow.resize((size, size), Image.Resampling.BICUBIC, box=(0, top - first, size, bottom - first))


def _resized(source: tuple[int, int], size: int) -> tuple[int, int]:
    width, height = source
    return (size, int(size * height / width)) if width <= height else (int(size * width / height), size)
