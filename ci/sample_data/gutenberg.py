"""`gutenberg/` (optional, needs npm): fifteen books of Project Gutenberg, as `text/` has its works; twice as much text.

Shakespeare's plays are left out: `text/` has them. The Bible is more than a third of it.
"""

from __future__ import annotations

import tarfile
from pathlib import Path, PurePosixPath

from ci.sample_data.packages import GUTENBERG
from ci.sample_data.plain_text import sentences

PACKAGES = (GUTENBERG,)
SPLIT_OF_BOOK = {
    "austen-persuasion": "valid",
    "chesterton-thursday": "test",
}


def build(archives: dict[str, Path], folder: Path) -> None:
    """Write the set into the empty `folder`."""
    books: dict[str, list[str]] = {"train": [], "valid": [], "test": []}
    with tarfile.open(archives[GUTENBERG.name]) as tar:
        for member in sorted(tar.getmembers(), key=lambda member: member.name):
            name = PurePosixPath(member.name)
            if name.suffix == ".txt" and name.parent.name == "gutenberg" and not name.stem.startswith("shakespeare"):
                text = tar.extractfile(member).read().decode("latin-1")
                books[SPLIT_OF_BOOK.get(name.stem, "train")].append("\n".join(sentences(text)))
    for split, texts in books.items():
        (folder / f"{split}.txt").write_text("\n\n".join(texts) + "\n", encoding="utf-8")
