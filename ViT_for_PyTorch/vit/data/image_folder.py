"""Image folders `root/<class>/**/picture.jpg`: the class list, the pictures, and reading one of them as RGB."""

import io
import os
import struct
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import simplejpeg
from PIL import ExifTags, Image, ImageOps

from common.errors import UsageError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp", ".gif")
_JPEG_START = b"\xff\xd8"
_EXIF_MARK, _EXIF_REACH = b"Exif\0\0", 1 << 16  # a JPEG has it in one of its first segments
_JPEG_COLORS = ("Gray", "YCbCr", "RGB")  # of the file; simplejpeg misreads the inverted CMYK that Photoshop writes
_SIXTEEN_BIT = ("I;16", "I;16L", "I;16B", "I;16N")


class BrokenImage(ValueError):
    """A picture that cannot be read; the message names the file and the reason."""


@dataclass(frozen=True)
class ImageFolder:
    """What `scan` found: class names in sorted order, and for each picture its path and class index."""

    root: Path
    classes: list[str]
    paths: list[str]
    targets: list[int]

    def __len__(self) -> int:
        return len(self.paths)


def scan(root: str | Path) -> ImageFolder:
    """Lists the pictures below `root`; their order and the class indices are those of torchvision's ImageFolder.

    Raises:
        UsageError: the folder is missing, is no folder, is empty, has no class folders, or a class has no pictures.
    """
    root = Path(root)
    if not root.is_dir():
        what = "not a folder" if root.exists() else "no such folder"
        raise UsageError(f"image folder {root}: {what}; expected {root}/<class>/<picture>")
    entries = sorted((entry for entry in os.scandir(root) if not _is_litter(entry.name)), key=lambda e: e.name)
    if not entries:
        raise UsageError(f"image folder {root} is empty; expected {root}/<class>/<picture>")
    classes = [entry.name for entry in entries if entry.is_dir()]
    if not classes:
        raise UsageError(
            f"image folder {root} has no class folders, only files such as {entries[0].name}; "
            f"expected {root}/<class>/<picture>"
        )
    paths: list[str] = []
    targets: list[int] = []
    for index, name in enumerate(classes):
        found = list(list_pictures(str(root / name)))
        if not found:
            raise UsageError(
                f"class folder {root / name} has no pictures ({', '.join(IMAGE_SUFFIXES)}); fill it or remove it"
            )
        paths += found
        targets += [index] * len(found)
    return ImageFolder(root, classes, paths, targets)


def list_pictures(folder: str) -> Iterator[str]:
    """Picture files below a folder, sorted within each folder, files before deeper folders.

    Hidden ones (macOS's ._picture.jpg), __MACOSX and folders met before, as links can lead in circles, are left out.
    """
    seen: set[str] = set()
    for where, folders, files in os.walk(folder, followlinks=True):
        place = os.path.realpath(where)
        if place in seen:
            folders.clear()
            continue
        seen.add(place)
        folders[:] = sorted(name for name in folders if not _is_litter(name))
        names = (name for name in sorted(files) if name.lower().endswith(IMAGE_SUFFIXES) and not _is_litter(name))
        yield from (os.path.join(where, name) for name in names)


def _is_litter(name: str) -> bool:
    return name.startswith(".") or name == "__MACOSX"


def check_same_classes(train: ImageFolder, evaluation: ImageFolder) -> None:
    """`UsageError` unless both folders have the same class names: else equal indices would mean different classes."""
    if train.classes == evaluation.classes:
        return
    only_train = sorted(set(train.classes) - set(evaluation.classes))
    only_evaluation = sorted(set(evaluation.classes) - set(train.classes))
    parts = [
        f"only in {folder.root}: {', '.join(names[:5])}{' ...' if len(names) > 5 else ''} ({len(names)})"
        for folder, names in ((train, only_train), (evaluation, only_evaluation))
        if names
    ]
    raise UsageError(
        f"the class folders of {train.root} ({len(train.classes)}) and {evaluation.root} "
        f"({len(evaluation.classes)}) differ; {'; '.join(parts)}"
    )


def read_image(path: str | os.PathLike[str]) -> np.ndarray:
    """A picture file of any format and mode, upright, as uint8 RGB [H, W, 3]. Raises `BrokenImage` naming the file.

    JPEG goes through simplejpeg with the exact DCT and chroma upsampling, which gives PIL's pixels; what it does not
    read (CMYK, odd files), and what a camera says to turn, goes through PIL. Over Pillow's limit of 179 million pixels
    a file is refused.
    """
    try:
        data = Path(path).read_bytes()
        if data.startswith(_JPEG_START) and (pixels := _decode_jpeg(data)) is not None:
            return pixels
        with Image.open(io.BytesIO(data)) as image:
            return np.array(to_rgb(upright(image)))  # [H, W, 3]; a copy, for torch refuses to share read-only memory
    except Exception as error:  # decoders raise OSError, SyntaxError, ValueError, struct.error, DecompressionBomb...
        raise BrokenImage(f"{os.fspath(path)}: not a readable picture ({_reason(error)})") from error


def _decode_jpeg(data: bytes) -> np.ndarray | None:
    if _EXIF_MARK in data[:_EXIF_REACH]:
        with Image.open(io.BytesIO(data)) as image:
            if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:
                return None
    try:
        height, width, colors, _ = simplejpeg.decode_jpeg_header(data)
        if colors not in _JPEG_COLORS or height * width > 2 * Image.MAX_IMAGE_PIXELS:
            return None  # PIL's part; it refuses what is too large
        return simplejpeg.decode_jpeg(data, "RGB", fastdct=False, fastupsample=False)
    except ValueError:  # it refuses on any libjpeg warning; PIL tells a flawed file from a broken one
        return None


def upright(image: Image.Image) -> Image.Image:
    """A PIL picture turned as its EXIF orientation says, as the reference does it; damaged EXIF counts as none."""
    try:
        return ImageOps.exif_transpose(image)
    except (ValueError, KeyError, SyntaxError, TypeError, struct.error):
        return image


def to_rgb(image: Image.Image) -> Image.Image:
    """A PIL picture of any mode as RGB. Transparency is dropped, 16-bit grey is scaled to 8 bits."""
    if image.mode == "RGB":
        return image
    if image.mode in _SIXTEEN_BIT:
        grey = (np.asarray(image).astype(np.uint32) * 255 + 32767) // 65535  # [H, W]
        return Image.fromarray(grey.astype(np.uint8)).convert("RGB")
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # PIL's own advice for palettes with transparency
    return image.convert("RGB")


def _reason(error: BaseException) -> str:
    text = str(error).split("<_io.BytesIO")[0].strip()  # PIL names the buffer it was given
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


class BadFiles:
    """Broken pictures met in a run, by file: each is warned of once, and too many are an error."""

    LIMIT = 0.01  # of the pictures of the folder

    def __init__(self, folder: ImageFolder):
        self.folder = folder
        self.reasons: dict[str, str] = {}

    def __len__(self) -> int:
        return len(self.reasons)

    def add(self, found: tuple[tuple[str, str], ...]) -> None:
        """Adds (file, reason) pairs. ValueError once more than 1 % of the folder's files are bad."""
        for path, reason in found:
            if path in self.reasons:
                continue
            self.reasons[path] = reason
            warnings.warn(f"skipped {reason}", stacklevel=3)
            if len(self) > self.LIMIT * len(self.folder):
                raise ValueError(
                    f"{len(self)} of the {len(self.folder)} pictures of {self.folder.root} are broken, more than "
                    f"{self.LIMIT:.0%}: repair or remove them. The last one: {reason}"
                )

    def state_dict(self) -> dict[str, str]:
        """For a checkpoint, so that a resumed run counts on."""
        return dict(self.reasons)

    def load_state_dict(self, state: dict[str, str]) -> None:
        self.reasons.update(state)
