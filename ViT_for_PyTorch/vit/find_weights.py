"""From what a user types as a checkpoint to the file: a published name, a file, or the output folder of a run."""

from __future__ import annotations

from pathlib import Path

from common.shards import PROGRESS
from vit.training.checkpoint import folder_of, newest
from vit.weights import download
from vit.weights.hub_files import MODEL_FILES


def weights_of(name_or_path: str | Path) -> Path:
    """The local file with the weights of a published name (downloaded when needed), a file, or a run's folder."""
    if Path(name_or_path).exists():
        return checkpoint_of(name_or_path)
    return download.fetch(str(name_or_path))


def checkpoint_of(path: str | Path) -> Path:
    """The checkpoint itself, or the best (else the newest) of the output folder of a run."""
    path = Path(path)
    if path.is_file() or (path / PROGRESS).is_file() or any((path / name).is_file() for name in MODEL_FILES):
        return path
    for folder in (path, folder_of(path)):
        if (folder / "best.pt").is_file():
            return folder / "best.pt"
        if folder.is_dir() and (found := newest(folder)):
            return found
    raise ValueError(f"{path}: no best.pt or checkpoint-* in it or in {folder_of(path)}")
