"""`captioned_icons/`: icons with their names as captions, and three ways of holding some out.

Tables as `caption_tables` writes them, one caption a picture, no caption twice in a table of held-out pictures:

- `train`: five families of icons, without what the next two hold out.
- `unseen_combination`: combinations of words ("bell off") all of whose words are trained on, in other combinations
  only; in whatever order, style or family, no picture of the combination is in `train`.
- `unseen_concept`: names with a word that no picture of `train` has.
- `unseen_artist`: the sixth family's drawings of concepts that `train` has, in its own styles.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from ci.sample_data import icon_table
from ci.sample_data.caption_tables import write_split
from ci.sample_data.icon_table import HELD_OUT_FAMILY, Icon, share_of

PACKAGES = icon_table.PACKAGES
COMBINATION_SHARE = 0.08  # of the combinations that may be held out
CONCEPT_SHARE = 0.05  # of the words
_LEAST_OTHERS = 3  # other combinations each word of a held-out combination is in


def build(archives: dict[str, Path], folder: Path) -> None:
    """Write the set into the empty `folder`."""
    for split, icons in splits(icon_table.read(archives)).items():
        write_split(folder, split, ((i.slug, i.drawing.convert("RGB"), [i.caption]) for i in icons))


def splits(icons: Iterable[Icon]) -> dict[str, list[Icon]]:
    """The icons of every table."""
    ours = [icon for icon in icons if icon.family != HELD_OUT_FAMILY]
    new_words = {word for icon in ours for word in icon.words if share_of(f"word {word}") < CONCEPT_SHARE}
    with_new_word = [icon for icon in ours if icon.words & new_words]
    rest = [icon for icon in ours if not icon.words & new_words]
    held_out = combinations_to_hold_out({icon.words for icon in rest})
    train = [icon for icon in rest if icon.words not in held_out]
    known = {icon.concept for icon in train}
    return {
        "train": train,
        "unseen_combination": one_of_each_concept(icon for icon in rest if icon.words in held_out),
        "unseen_concept": one_of_each_concept(with_new_word),
        "unseen_artist": one_of_each_concept(
            icon for icon in icons if icon.family == HELD_OUT_FAMILY and icon.concept in known
        ),
    }


def combinations_to_hold_out(combinations: Iterable[frozenset[str]]) -> set[frozenset[str]]:
    """Some of the combinations of two words or more, chosen by hash; every word keeps enough others."""
    left = Counter(word for combination in combinations for word in combination)
    candidates = sorted((" ".join(sorted(c)) for c in combinations if len(c) > 1), key=share_of)
    chosen: set[frozenset[str]] = set()
    for text in candidates[: round(COMBINATION_SHARE * len(candidates))]:
        words = frozenset(text.split())
        if all(left[word] > _LEAST_OTHERS for word in words):
            chosen.add(words)
            left.subtract(words)
    return chosen


def one_of_each_concept(icons: Iterable[Icon]) -> list[Icon]:
    """Of a concept's drawings the one whose name has the lowest hash: no two captions alike, no easy neighbours."""
    kept: dict[frozenset[str], Icon] = {}
    for icon in sorted(icons, key=lambda icon: share_of(icon.slug)):
        kept.setdefault(icon.words, icon)
    return sorted(kept.values(), key=lambda icon: icon.slug)
