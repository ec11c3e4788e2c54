"""Pictures with captions as tables: `pictures/` and, a line a pair, `<split>.jsonl` of `image_path` and `caption`."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from PIL import Image


def write_split(folder: Path, split: str, rows: Iterable[tuple[str, Image.Image, Iterable[str]]]) -> None:
    """Writes `<split>.jsonl` and the pictures it names into `folder`.

    Args:
        rows: (file name without ending, picture, its captions) of every picture, in the order of the table.
    """
    (folder / "pictures").mkdir(exist_ok=True)
    pairs = []
    for name, picture, captions in rows:
        path = f"pictures/{name}.png"
        picture.save(folder / path)
        pairs += [(path, caption) for caption in captions]
    write_pairs(folder / f"{split}.jsonl", pairs)


def write_pairs(path: Path, pairs: Iterable[tuple[str, str]]) -> None:
    """Writes a table of (picture, from the table's folder; caption)."""
    with path.open("w", encoding="utf-8") as table:
        for picture, caption in pairs:
            table.write(json.dumps({"image_path": picture, "caption": caption}, ensure_ascii=False) + "\n")
