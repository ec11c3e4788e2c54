"""`genres/` (optional, needs npm): the Brown corpus, 500 texts of 1961 in 15 genres, split by text within each genre.

`{train,valid,test}.txt` has a sentence a line and an empty line between texts, for pretraining; the .csv beside it
passages of whole sentences of at least 50 words (`sentence`) and their genre (`label`), for fine-tuning.
"""

from __future__ import annotations

import tarfile
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from ci.sample_data.icon_table import share_of
from ci.sample_data.packages import BROWN
from ci.sample_data.text_tables import HELD_OUT, write_table

PACKAGES = (BROWN,)
PASSAGE = 50  # words at least
_MARKS = {"``": '"', "''": '"'}


def build(archives: dict[str, Path], folder: Path) -> None:
    """Write the set into the empty `folder`."""
    texts, genre_of = read(archives[BROWN.name])
    parts = {"train": [], "valid": [], "test": []}
    for name, split in splits(genre_of).items():
        parts[split].append(name)
    for split, names in parts.items():
        written = "\n\n".join("\n".join(texts[name]) for name in sorted(names))
        (folder / f"{split}.txt").write_text(f"{written}\n", encoding="utf-8")
        rows = ((passage, genre_of[name]) for name in sorted(names) for passage in passages(texts[name]))
        write_table(folder / f"{split}.csv", rows)


def read(archive: Path) -> tuple[dict[str, list[str]], dict[str, str]]:
    """({text: its sentences}, {text: its genre})."""
    with tarfile.open(archive) as tar:
        lines = tar.extractfile("package/cats.txt").read().decode().splitlines()
        genre_of = dict(line.split() for line in lines if line)
        texts = {}
        for name in genre_of:
            tagged = tar.extractfile(f"package/{name}").read().decode().splitlines()
            texts[name] = [sentence(line) for line in tagged if line.strip()]
    return texts, genre_of


def sentence(tagged: str) -> str:
    """The words of a line of "word/tag", with a space around every mark as the corpus has it."""
    words = (token.rsplit("/", 1)[0] for token in tagged.split())
    return " ".join(_MARKS.get(word, word) for word in words)


def splits(genre_of: dict[str, str]) -> dict[str, str]:
    """{text: split}: of each genre the same share, but one text at least."""
    of_genre = defaultdict(list)
    for name, genre in genre_of.items():
        of_genre[genre].append(name)
    found = {}
    for names in of_genre.values():
        share = max(1, round(HELD_OUT * len(names)))
        for place, name in enumerate(sorted(names, key=share_of)):
            found[name] = "test" if place < share else "valid" if place < 2 * share else "train"
    return found


def passages(sentences: list[str]) -> Iterator[str]:
    """Whole sentences, PASSAGE words or more; what is left at a text's end is dropped."""
    passage: list[str] = []
    for line in sentences:
        passage.append(line)
        if sum(len(part.split()) for part in passage) >= PASSAGE:
            yield " ".join(passage)
            passage = []
