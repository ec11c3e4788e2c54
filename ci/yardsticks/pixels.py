"""Pictures as small vectors of raw pixels: the nearest of them by cosine, and the class that the nearest one has."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

SIDE = 12  # pixels of a thumbnail; 8 and 16 give less on the sample pictures


def thumbnails(paths: Sequence[Path]) -> np.ndarray:
    """Float32 [N, SIDE * SIDE * 3] in 0..1: each picture's RGB values, shrunk by averaging."""
    rows = [np.asarray(Image.open(path).convert("RGB").resize((SIDE, SIDE), Image.BOX), np.float32) for path in paths]
    return np.stack(rows).reshape(len(rows), -1) / 255


def similarities(train: np.ndarray, val: np.ndarray) -> np.ndarray:
    """Cosines [V, T] between rows of `val` [V, d] and `train` [T, d], both less the mean of `train`."""
    mean = train.mean(0)
    return unit(val - mean) @ unit(train - mean).T


def nearest_class(train: Path, val: Path) -> dict[str, float]:
    """Accuracies in percent on an image folder `val` from the image folder `train`, without learning.

    Returns:
        guessing: always the class that is largest in `val`; nearest_pixels: the class of the nearest training picture.
    """
    known_paths, known = _image_folder(train)
    asked_paths, wanted = _image_folder(val)
    nearest = similarities(thumbnails(known_paths), thumbnails(asked_paths)).argmax(1)  # [V]
    largest = max(np.unique(wanted, return_counts=True)[1])
    return {
        "guessing": 100 * float(largest / len(wanted)),
        "nearest_pixels": 100 * float((known[nearest] == wanted).mean()),
    }


def _image_folder(folder: Path) -> tuple[list[Path], np.ndarray]:
    paths = sorted(path for path in folder.glob("[!.]*/*") if path.is_file())  # hidden: caches of trainings
    return paths, np.array([path.parent.name for path in paths])


def unit(rows: np.ndarray) -> np.ndarray:
    """Rows [N, d] scaled to length 1; a row of zeros stays one."""
    return rows / (np.linalg.norm(rows, axis=1, keepdims=True) + 1e-6)
