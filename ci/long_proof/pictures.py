"""CIFAR-10 as the trainings want it: all pictures, shares of the labels, and captions."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

from ci.long_proof.sizes import SHARES, Size
from common.errors import UsageError

CAPTIONS = (  # of openai/CLIP's prompts for CIFAR-10
    "a photo of a {}.",
    "a blurry photo of a {}.",
    "a low contrast photo of a {}.",
    "a bad photo of a {}.",
    "a good photo of a {}.",
    "a photo of a small {}.",
)


def prepare(source: Path, folder: Path, size: Size) -> None:
    """Links into `folder`: train/, val/ and labels-SHARE/, each with class folders; train.jsonl and templates.txt.

    What is there already stays. A share has every so many-th picture of the sorted list of each class.

    Raises:
        UsageError: the folder holds the pictures of another size, or of one that was not noted.
    """
    noted, wanted = folder / "size.json", json.dumps(asdict(size)) + "\n"
    found = noted.read_text(encoding="utf-8") if noted.is_file() else None
    if folder.is_dir() and found != wanted:
        raise UsageError(
            f"{folder}: holds the pictures of another --size ({(found or 'not noted').strip()}); "
            "name another --output_dir for this one"
        )
    if (folder / "templates.txt").exists():  # written last
        return
    folder.mkdir(parents=True, exist_ok=True)
    noted.write_text(wanted, encoding="utf-8")  # first, so that pictures half made are of a known size too
    classes = sorted(path for path in (source / "train").iterdir() if path.is_dir())
    rows = []
    for class_folder in classes:
        name = class_folder.name
        pictures = sorted(class_folder.iterdir())[: size.pictures // len(classes)]
        held_out = sorted((source / "val" / name).iterdir())[: size.held_out // len(classes)]
        _link(pictures, folder / "train" / name)
        _link(held_out, folder / "val" / name)
        for share in SHARES:
            _link(pictures[:: 100 // share], folder / f"labels-{share}" / name)
        for number, picture in enumerate(pictures):
            caption = CAPTIONS[number % len(CAPTIONS)].format(name)
            rows.append(json.dumps({"image_path": str(picture), "caption": caption}) + "\n")
    (folder / "train.jsonl").write_text("".join(rows), encoding="utf-8")
    (folder / "templates.txt").write_text("\n".join(CAPTIONS) + "\n", encoding="utf-8")


def _link(pictures: Iterable[Path], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for picture in pictures:
        link = folder / picture.name
        if not link.is_symlink():
            link.symlink_to(picture)
