"""`glosses/` (optional, needs npm): WordNet's glosses and what each is a gloss of, one of 45 supersenses.

`{train,valid,test}.txt` has a gloss a line with its examples, for pretraining; the .csv beside it the definitions alone
(`sentence`) and their supersense (`label`, e.g. noun.animal), for fine-tuning. The glosses below one hypernym, which
are often nearly the same ("a town in central Arkansas"), are on one side.
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ci.sample_data.packages import WORDNET
from ci.sample_data.text_tables import split_of, write_table

PACKAGES = (WORDNET,)
# lexicographer files, by number (WordNet's lexnames(5WN))
SUPERSENSES = (
    "adj.all adj.pert adv.all noun.Tops noun.act noun.animal noun.artifact noun.attribute noun.body noun.cognition "
    "noun.communication noun.event noun.feeling noun.food noun.group noun.location noun.motive noun.object noun.person "
    "noun.phenomenon noun.plant noun.possession noun.process noun.quantity noun.relation noun.shape noun.state "
    "noun.substance noun.time verb.body verb.change verb.cognition verb.communication verb.competition "
    "verb.consumption verb.contact verb.creation verb.emotion verb.motion verb.perception verb.possession verb.social "
    "verb.stative verb.weather adj.ppl"
).split()
_ABOVE = ("@", "@i", "&", "\\")  # hypernym, class of an instance, similar adjective, what an adjective pertains to


@dataclass(frozen=True)
class Gloss:
    """One synset's; `family` is its first hypernym, or itself where it has none."""

    text: str
    supersense: str
    family: str

    @property
    def definition(self) -> str:
        """Without the quoted examples."""
        return self.text.split('; "')[0]


def build(archives: dict[str, Path], folder: Path) -> None:
    """Write the set into the empty `folder`."""
    parts: dict[str, list[Gloss]] = {"train": [], "valid": [], "test": []}
    for gloss in read(archives[WORDNET.name]):
        parts[split_of(gloss.family)].append(gloss)
    for split, glosses in parts.items():
        text = "".join(f"{gloss.text}\n" for gloss in glosses)
        (folder / f"{split}.txt").write_text(text, encoding="utf-8")
        write_table(folder / f"{split}.csv", ((gloss.definition, gloss.supersense) for gloss in glosses))


def read(archive: Path) -> Iterator[Gloss]:
    """All glosses, in the order of WordNet's files (format: wndb(5WN))."""
    with tarfile.open(archive) as tar:
        for part in ("noun", "verb", "adj", "adv"):
            data = tar.extractfile(f"package/dict/data.{part}").read().decode("utf-8")
            yield from (_gloss(part, line) for line in data.splitlines() if not line.startswith("  "))


def _gloss(part: str, line: str) -> Gloss:
    fields, text = line.split(" | ", 1)
    offset, number, _, words, *rest = fields.split()
    pointers = rest[2 * int(words, 16) :]  # their number, then four fields each
    above = [pointers[i + 1] for i in range(1, 4 * int(pointers[0]), 4) if pointers[i] in _ABOVE]
    return Gloss(text.strip(), SUPERSENSES[int(number)], f"{part} {above[0] if above else offset}")
