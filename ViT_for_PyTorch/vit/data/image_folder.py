"""Image folders `root/<class>/**/picture.jpg`: the class list, the pictures, and reading one of them as RGB."""

import os
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from common.data import pictures
from common.errors import UsageError

BrokenImage = pictures.BrokenPicture


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
    entries = sorted((entry for entry in os.scandir(root) if not pictures.is_litter(entry.name)), key=lambda e: e.name)
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
    empty: list[str] = []
    for index, name in enumerate(classes):
        found = list(pictures.find(root / name))
        empty += [] if found else [name]
        paths += found
        targets += [index] * len(found)
    if empty:
        more = f" ... ({len(empty)} of them)" if len(empty) > 5 else ""
        raise UsageError(
            f"class folder {', '.join(str(root / name) for name in empty[:5])}{more} has no pictures "
            f"({', '.join(pictures.SUFFIXES)}); fill it or remove it"
        )
    return ImageFolder(root, classes, paths, targets)


def scan_both(train: str | Path, evaluation: str | Path) -> tuple[ImageFolder, ImageFolder]:
    """Both folders of a training. All that is wrong with either is one error, that classes differ included.

    Raises:
        UsageError: see `scan` and `check_same_classes`.
    """
    folders, problems = [], []
    for root in (train, evaluation):
        try:
            folders.append(scan(root))
        except UsageError as error:
            problems.append(str(error))
            if Path(root).is_dir():  # its classes are compared all the same
                names = sorted(e.name for e in os.scandir(root) if e.is_dir() and not pictures.is_litter(e.name))
                folders.append(ImageFolder(Path(root), names, [], []))
    if len(folders) == 2 and all(folder.classes for folder in folders):
        try:
            check_same_classes(*folders)
        except UsageError as error:
            problems.append(str(error))
    if problems:
        raise UsageError("; ".join(problems))
    return folders[0], folders[1]


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
        f"({len(evaluation.classes)}) differ and must be the same; {'; '.join(parts)}"
    )


def read_image(path: str | os.PathLike[str]) -> np.ndarray:
    """A picture file of any format and mode, upright, as uint8 RGB [H, W, 3]. Raises `BrokenImage` naming the file."""
    return np.array(pictures.read(path, turn=True))  # [H, W, 3]; a copy: torch refuses to share read-only memory


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
