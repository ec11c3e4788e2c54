"""Decoding pictures, and the look at some of them before a training."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from common.distributed import broadcast_object, rank
from common.errors import UsageError


def read_image(path: Path) -> Image.Image:
    """The picture as RGB.

    Raises:
        ValueError: naming the file, when it cannot be decoded. (The reference trains on another picture instead.)
    """
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path}: not a readable picture ({error}); remove it or fetch it again") from error


def check_images(paths: Sequence[Path], count: int = 200) -> None:
    """Before training: `count` of the pictures, evenly spread, decode. The main rank looks, all learn of it.

    Raises:
        UsageError: on all ranks, naming the files that do not.
    """
    problems = []
    if rank() == 0:
        for index in range(0, len(paths), max(1, len(paths) // count)):
            try:
                read_image(paths[index])
            except ValueError as error:
                problems.append(str(error))
    problems = broadcast_object(problems)
    if problems:
        more = f"\n  ... and {len(problems) - 10} more" if len(problems) > 10 else ""
        raise UsageError("\n  ".join(problems[:10]) + more)
