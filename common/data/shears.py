"""timm's shears and translations, computed along the one axis that they move: a third of Pillow's time, its pixels.

Pillow resamples every pixel over 16 neighbours in double precision, of which twelve have the weight 0 here. The same
four weights in single precision give the same picture, but for one grey level in at most 4 values of 1000.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

SMALLEST = 128  # pixels a side: below, what a call costs is more than it saves


def use_fast_shears() -> None:
    """Puts these in the place of timm's, for every policy that is built from now on."""
    from timm.data import auto_augment  # a slow import, of which most processes have no need

    auto_augment.NAME_TO_OP |= {
        "ShearX": _sheared(1, auto_augment.shear_x),
        "ShearY": _sheared(0, auto_augment.shear_y),
        "TranslateXRel": _translated(1, auto_augment.translate_x_rel),
        "TranslateYRel": _translated(0, auto_augment.translate_y_rel),
    }


def _sheared(axis: int, slow: Any) -> Any:
    def shear(image: Image.Image, factor: float, **options: Any) -> Image.Image:
        lines = image.size[axis]  # width and height: those of the axis that stays
        shift = factor * (np.arange(lines) + 0.5)
        return _moved(image, shift, axis, options) if _is_ours(image, options) else slow(image, factor, **options)

    return shear


def _translated(axis: int, slow: Any) -> Any:
    def translate(image: Image.Image, share: float, **options: Any) -> Image.Image:
        shift = np.full(image.size[axis], share * image.size[1 - axis])
        return _moved(image, shift, axis, options) if _is_ours(image, options) else slow(image, share, **options)

    return translate


def _is_ours(image: Image.Image, options: dict[str, Any]) -> bool:
    fits = image.mode == "RGB" and min(image.size) >= SMALLEST
    return fits and options.get("resample") == Image.Resampling.BICUBIC and "fillcolor" in options


def _moved(image: Image.Image, shift: np.ndarray, axis: int, options: dict[str, Any]) -> Image.Image:
    """Each line of the picture along `axis` takes its pixels `shift` further on; float64 [lines]."""
    width, height = image.size
    length = (height, width)[axis]
    whole = np.floor(shift)
    # the four neighbours of each target lie side by side: [lines, L + 3]
    source = (torch.from_numpy(whole).long()[:, None] + torch.arange(-1, length + 2)).clamp_(0, length - 1)
    begin, end = (torch.from_numpy(np.ceil(edge - shift - 0.5)).int()[:, None] for edge in (0, length))
    target = torch.arange(length, dtype=torch.int32)
    outside = (target < begin) | (target >= end)  # [lines, L]
    weights = _weights(torch.from_numpy(shift - whole).float())  # [4, lines]
    if axis == 0:
        source, outside, weights = source.t(), outside.t(), weights.repeat_interleave(4, 1)[:, None]  # [4, 1, 4 W]
    else:
        weights = weights[:, :, None]  # [4, H, 1]
    pixels = np.frombuffer(bytearray(image.tobytes("raw", "RGBX")), np.int32).reshape(height, width)
    window = torch.from_numpy(pixels).gather(axis, source).view(torch.uint8).float()  # 4 values a pixel
    step, size = (4, 4 * width) if axis == 1 else (1, height)
    out = window.narrow(axis, 0, size) * weights[0]  # [H, 4 W]
    for k in (1, 2, 3):
        out.addcmul_(window.narrow(axis, k * step, size), weights[k])
    packed = torch.from_numpy(out.clamp_(0, 255).numpy().astype(np.uint8)).view(torch.int32)  # [H, W]
    fill = int(np.array([*options["fillcolor"], 0], dtype=np.uint8).view(np.int32)[0])
    return Image.frombytes("RGB", image.size, packed.masked_fill_(outside, fill).numpy().tobytes(), "raw", "RGBX")


def _weights(d: Tensor) -> Tensor:
    """Pillow's cubic (a = -1) at a distance d in 0..1 behind the second of four neighbours, [4, *d.shape]."""
    square, cube = d * d, d * d * d
    return torch.stack((-d + 2 * square - cube, 1 - 2 * square + cube, d + square - cube, cube - square))
