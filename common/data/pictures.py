"""Picture files of every project: which files are pictures, reading one, and what becomes of broken ones.

    paths = list(find(folder))                       # sorted, no litter of macOS, links in circles end
    pixels = np.asarray(read(path, turn=True))       # RGB; BrokenPicture names file and reason
    check(paths)                                     # before training: UsageError that lists the broken ones

One policy. Broken, cut short or larger than `MAX_PIXELS` (environment variable PICTURE_MAX_PIXELS): BrokenPicture.
16-bit grey is scaled to 8 bits, transparency dropped, EXIF orientation not followed. What a project's reference does
otherwise is said by its call: `turn`, `on_white`, `clip_16_bit` as Pillow does.
"""

from __future__ import annotations

import io
import os
import struct
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import simplejpeg
from PIL import ExifTags, Image, ImageOps

from common.distributed import broadcast_object, rank
from common.errors import UsageError

SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp", ".gif")
MAX_PIXELS = int(os.environ.get("PICTURE_MAX_PIXELS") or 178_956_970)  # what Pillow refuses by itself, 512 MiB in RGB
Image.MAX_IMAGE_PIXELS = MAX_PIXELS // 2  # Pillow warns above it and refuses above twice as many
_JPEG_START = b"\xff\xd8"
_JPEG_COLORS = ("Gray", "YCbCr", "RGB")  # of the file; simplejpeg misreads the inverted CMYK that Photoshop writes
_EXIF_REACH = 1 << 16  # a JPEG has it in one of its first segments
_SIXTEEN_BIT = ("I;16", "I;16L", "I;16B", "I;16N", "I")


class BrokenPicture(ValueError):
    """A picture that cannot be read; the message names the file and the reason."""

    for_user = True


def is_litter(name: str) -> bool:
    """What an archive of macOS or a desktop leaves beside pictures: ._1.jpg, .thumbnails, __MACOSX."""
    return name.startswith(".") or name == "__MACOSX"


def is_picture(name: str) -> bool:
    return name.lower().endswith(SUFFIXES) and not is_litter(name)


def find(folder: str | Path) -> Iterator[str]:
    """Picture files below a folder, sorted within each folder, files before deeper folders; links are followed.

    A link to a folder that it lies in itself is not: it would never end.
    """
    yield from _find(os.fspath(folder), ())


def _find(folder: str, above: tuple[tuple[int, int], ...]) -> Iterator[str]:
    status = os.stat(folder)
    place = (status.st_dev, status.st_ino)
    if place in above:
        return
    with os.scandir(folder) as entries:
        # a named pipe is left out: opening it would wait for ever; a link to nothing stays, and is named on reading
        found = sorted(
            (entry.name, entry.is_dir())
            for entry in entries
            if not is_litter(entry.name) and (entry.is_dir() or entry.is_file() or not os.path.exists(entry.path))
        )
    yield from (os.path.join(folder, name) for name, is_folder in found if not is_folder and is_picture(name))
    for name, is_folder in found:
        if is_folder:
            yield from _find(os.path.join(folder, name), (*above, place))


def read(path: str | Path, turn: bool = False, on_white: bool = False, clip_16_bit: bool = False) -> Image.Image:
    """A picture file of any format and mode as RGB.

    Args:
        path: of a file, or what stands for one inside another: with `read_bytes` and `__fspath__`.
        turn: as its EXIF orientation says; damaged EXIF counts as none.
        on_white: transparency is laid on white; else it is dropped.
        clip_16_bit: values above 255 of 16-bit grey become white; else they are scaled.

    Raises:
        BrokenPicture: naming the file and the reason.
    """
    try:
        data = (path if hasattr(path, "read_bytes") else Path(path)).read_bytes()
    except OSError as error:
        raise BrokenPicture(f"{path}: {error.strerror}") from error
    return decode(data, os.fspath(path), turn, on_white, clip_16_bit)


def decode(
    data: bytes, name: str, turn: bool = False, on_white: bool = False, clip_16_bit: bool = False
) -> Image.Image:
    """As `read`, from a file's bytes; `name` is for the message.

    JPEG goes through simplejpeg with the exact DCT and chroma upsampling, which gives Pillow's pixels; what it does not
    read (CMYK, odd files), and what is to be turned, goes through Pillow.
    """
    try:
        if data.startswith(_JPEG_START) and not (turn and _is_turned(data)):
            pixels = _decode_jpeg(data)
            if pixels is not None:
                return Image.fromarray(pixels)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # below our limit
            with Image.open(io.BytesIO(data)) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise ValueError(f"{image.width} x {image.height} pixels, over PICTURE_MAX_PIXELS={MAX_PIXELS}")
                image.load()
                return to_rgb(upright(image) if turn else image, on_white, clip_16_bit)
    except Exception as error:  # decoders raise OSError, SyntaxError, ValueError, struct.error, DecompressionBomb...
        reason = str(error).split("<_io.BytesIO")[0].strip()  # Pillow names the buffer it was given
        kind = "" if type(error) is ValueError else f"{type(error).__name__}: "
        raise BrokenPicture(f"{name}: not a readable picture ({kind}{reason})") from error


def _is_turned(data: bytes) -> bool:
    if b"Exif\0\0" not in data[:_EXIF_REACH]:
        return False
    with Image.open(io.BytesIO(data)) as image:
        return image.getexif().get(ExifTags.Base.Orientation, 1) != 1


def _decode_jpeg(data: bytes) -> np.ndarray | None:
    try:
        height, width, colors, _ = simplejpeg.decode_jpeg_header(data)
        if colors not in _JPEG_COLORS or height * width > MAX_PIXELS:
            return None  # Pillow's part
        return simplejpeg.decode_jpeg(data, "RGB", fastdct=False, fastupsample=False)
    except ValueError:  # it refuses on any libjpeg warning; Pillow tells a flawed file from a broken one
        return None


def upright(image: Image.Image) -> Image.Image:
    """Turned as its EXIF orientation says; damaged EXIF counts as none."""
    try:
        return ImageOps.exif_transpose(image)
    except (ValueError, KeyError, SyntaxError, TypeError, struct.error):
        return image


def to_rgb(image: Image.Image, on_white: bool = False, clip_16_bit: bool = False) -> Image.Image:
    """A picture of any mode as RGB, see `read`."""
    if image.mode == "RGB":
        return image
    if image.mode in _SIXTEEN_BIT and not clip_16_bit:
        grey = (np.asarray(image).clip(0, 65535).astype(np.uint32) * 255 + 32767) // 65535  # [H, W]
        return Image.fromarray(grey.astype(np.uint8)).convert("RGB")
    if "A" in image.getbands() or "transparency" in image.info:
        if on_white:
            image = image.convert("RGBA")
            return Image.alpha_composite(Image.new("RGBA", image.size, (255, 255, 255)), image).convert("RGB")
        if image.mode == "P":
            image = image.convert("RGBA")  # Pillow's own advice for palettes with transparency
    return image.convert("RGB")


# -- broken ones -------------------------------------------------------------------------------------------------------


def check(*folders: Sequence[str | Path], count: int = 200, shown: int = 10) -> None:
    """Before training: `count` pictures of each folder, evenly spread, can be read. The main rank looks, all learn.

    Raises:
        UsageError: on all ranks, listing those that cannot.
    """
    broken = []
    for paths in folders if rank() == 0 else ():
        for index in range(0, len(paths), max(1, len(paths) // count)):
            try:
                read(paths[index])
            except BrokenPicture as error:
                broken.append(str(error))
    broken = broadcast_object(broken)
    if broken:
        listed = "\n  ".join(broken[:shown])  # the first in the first line, which is what a launcher repeats
        more = f"\n  ... and {len(broken) - shown} more" if len(broken) > shown else ""
        kind = "picture" if len(broken) == 1 else "pictures"
        raise UsageError(f"{len(broken)} broken {kind}, remove or fetch again: {listed}{more}")
