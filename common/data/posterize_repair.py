"""timm's augmentation and the posterize of 0 bits, which Pillow has refused since version 13.

timm asks for it at the end of its range: `Posterize` below a magnitude of 2.5, `PosterizeIncreasing` (rand-...-inc1) at
10, which a drawn magnitude reaches about once in 570 pictures. Pillow used to answer with a black picture, as here.
"""

from __future__ import annotations

from typing import Any

from PIL import Image, ImageOps


def repair_posterize() -> None:
    """Puts `posterize` in the place of timm's, for every policy that is built from now on."""
    from timm.data import auto_augment  # a slow import, of which most processes have no need

    for name in ("Posterize", "PosterizeIncreasing", "PosterizeOriginal"):
        auto_augment.NAME_TO_OP[name] = posterize


def posterize(image: Image.Image, bits_to_keep: int, **_: Any) -> Image.Image:
    """The picture with its highest bits only; with none of them it is black."""
    if bits_to_keep < 1:
        return Image.new(image.mode, image.size)
    return ImageOps.posterize(image, min(bits_to_keep, 8))
