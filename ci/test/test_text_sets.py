"""The optional sets of labelled text, from archives of a few lines in the packages' formats."""

import csv
import io
import tarfile
from pathlib import Path

from ci.sample_data import genres, glosses, gutenberg, packages

NOUNS = """\
  1 This software and database is being provided to you
00001740 03 n 01 entity 0 002 ~ 00001930 n 0000 ~ 00002137 n 0000 | that which is perceived
02084071 05 n 03 dog 0 domestic_dog 0 Canis_familiaris 0 001 @ 00001740 n 0000 | a canid; "the dog barked all night"
02085374 05 n 01 toy_dog 0 001 @ 02084071 n 0000 | a very small dog; kept as a pet
02085620 05 n 01 chihuahua 0 002 ! 09999999 n 0000 @ 02084071 n 0000 | a tiny dog from Mexico
"""


def archive(path: Path, files: dict[str, str | bytes]) -> Path:
    with tarfile.open(path, "w:gz") as tar:
        for name, text in files.items():
            content = text if isinstance(text, bytes) else text.encode()
            member = tarfile.TarInfo(f"package/{name}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def table(path: Path) -> list[tuple[str, str]]:
    with path.open(encoding="utf-8", newline="") as stream:
        return [(row["sentence"], row["label"]) for row in csv.DictReader(stream)]


def test_a_gloss_has_its_supersense_and_stands_with_its_sisters(tmp_path):
    parts = {f"dict/data.{part}": "" for part in ("verb", "adj", "adv")}
    wordnet = archive(tmp_path / "wordnet.tgz", {"dict/data.noun": NOUNS, **parts})
    read = list(glosses.read(wordnet))
    assert [gloss.supersense for gloss in read] == ["noun.Tops", *["noun.animal"] * 3]
    assert [gloss.family for gloss in read] == ["noun 00001740", "noun 00001740", *["noun 02084071"] * 2]
    assert read[1].definition == "a canid" and read[2].definition == "a very small dog; kept as a pet"
    (tmp_path / "set").mkdir()
    glosses.build({packages.WORDNET.name: wordnet}, tmp_path / "set")
    rows = [row for split in ("train", "valid", "test") for row in table(tmp_path / "set" / f"{split}.csv")]
    lines = [(tmp_path / "set" / f"{split}.txt").read_text().splitlines() for split in ("train", "valid", "test")]
    assert sorted(rows) == sorted((gloss.definition, gloss.supersense) for gloss in read)
    assert sorted(sum(lines, [])) == sorted(gloss.text for gloss in read)


def test_every_genre_is_in_every_split_and_no_text_in_two(tmp_path):
    names = {f"c{genre}{number:02}": kind for genre, kind in (("a", "news"), ("k", "fiction")) for number in range(12)}
    line = "\n\n\tThe/at dog/nn of/in NAME/np barked/vbd ``/`` loudly/rb ''/'' ./.\n" * 20
    files = {"cats.txt": "".join(f"{name} {genre}\n" for name, genre in names.items())}
    brown = archive(tmp_path / "brown.tgz", files | {name: line.replace("NAME", name) for name in names})
    (tmp_path / "set").mkdir()
    genres.build({packages.BROWN.name: brown}, tmp_path / "set")
    seen = {}
    for split in ("train", "valid", "test"):
        rows = table(tmp_path / "set" / f"{split}.csv")
        assert {label for _, label in rows} == {"news", "fiction"}
        for sentence, label in rows:
            assert len(sentence.split()) >= 50 and sentence.endswith('barked " loudly " .')
            name = sentence.split()[3]
            assert names[name] == label and seen.setdefault(name, split) == split
    assert set(seen) == set(names)
    texts = (tmp_path / "set" / "valid.txt").read_text().strip().split("\n\n")
    assert len(texts) == 2 and all(len(text.splitlines()) == 20 for text in texts)


def test_books_are_split_by_book_without_the_plays_of_the_other_set(tmp_path):
    books = {f"gutenberg/{name}.txt": f"A book: {name}.\n\nIt ends." for name in (*gutenberg.SPLIT_OF_BOOK, "emma")}
    books |= {"gutenberg/shakespeare-hamlet.txt": "To be.", "gutenberg/README": "read", "README.md": "me"}
    books["gutenberg/accents.txt"] = "A fianc\xe9.".encode("latin-1")
    (tmp_path / "set").mkdir()
    gutenberg.build({packages.GUTENBERG.name: archive(tmp_path / "books.tgz", books)}, tmp_path / "set")
    text = {path.stem: path.read_text(encoding="utf-8") for path in (tmp_path / "set").iterdir()}
    assert text.pop("train") == "A fianc\xe9.\n\nA book: emma.\nIt ends.\n"
    assert text == {split: f"A book: {name}.\nIt ends.\n" for name, split in gutenberg.SPLIT_OF_BOOK.items()}
