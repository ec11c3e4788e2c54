"""`captioned_emoji/`: emoji with five captions each, and combinations of words held out.

Tables as `caption_tables` writes them:

- `train`: the families of `emoji_table` that are trained on, in all skin tones, without what is held out next.
- `unseen_combination`: of every figure drawn in several skin tones a part of them: the figure and the tone are trained
  on, each with others. Drawings that differ from a trained one in direction only are not asked for.
- `unseen_concept`: the families that `images/` and `coco2017/` hold out, without skin tones.

`zh/` has the same tables of the same pictures with their Chinese names, one caption each; a name that two pictures
share is left out.
"""

from __future__ import annotations

import json
import zipfile
from collections import Counter, defaultdict
from pathlib import Path

from ci.sample_data import coco_captions, emoji_table
from ci.sample_data.caption_tables import write_pairs, write_split
from ci.sample_data.emoji_table import Emoji
from ci.sample_data.icon_table import share_of
from ci.sample_data.packages import EMOJI

PACKAGES = emoji_table.PACKAGES
TONES = tuple(f"{tone} skin tone" for tone in ("medium-light", "medium-dark", "light", "dark", "medium"))
COMBINATION_SHARE = 0.2  # of a figure's skin tones: one of five
_LEAST_TONES = 3  # of a figure, for one of them to be held out


def build(archives: dict[str, Path], folder: Path) -> None:
    """Write the set into the empty `folder`."""
    table = emoji_table.read(archives)
    ambiguous = coco_captions.ambiguous_names(table)
    for split, part in splits(table).items():
        write_split(folder, split, ((e.code, e.picture(), coco_captions.captions(e, ambiguous)) for e in part))
    chinese = chinese_names(archives[EMOJI.name])
    shared = Counter(chinese.get(emoji.code) for emoji in table)
    (folder / "zh").mkdir()
    for split, part in splits(table).items():
        named = [(e.code, chinese[e.code]) for e in part if e.code in chinese and shared[chinese[e.code]] == 1]
        write_pairs(folder / "zh" / f"{split}.jsonl", ((f"../pictures/{code}.png", name) for code, name in named))


def chinese_names(wheel: Path) -> dict[str, str]:
    """The names of emoji (Unicode's CLDR, simplified) by code."""
    with zipfile.ZipFile(wheel) as archive:
        names = json.loads(archive.read("emoji/unicode_codes/emoji_zh.json"))
    codes = {text: emoji_table.plain_code("-".join(f"{ord(c):x}" for c in text)) for text in names}
    return {codes[text]: name.strip(":").replace("_", "，") for text, name in names.items()}


def splits(table: list[Emoji]) -> dict[str, list[Emoji]]:
    """The emoji of every table."""
    new = emoji_table.validation_families(table)
    known = [emoji for emoji in table if emoji.family not in new]
    figures: dict[str, list[Emoji]] = defaultdict(list)
    for emoji in known:
        if emoji.has_skin_tone:
            figures[figure(emoji.name)].append(emoji)
    held_out: set[str] = set()
    for tones in figures.values():
        if len(tones) >= _LEAST_TONES:
            by_hash = sorted(tones, key=lambda emoji: share_of(emoji.code))
            held_out.update(emoji.code for emoji in by_hash[: max(1, round(COMBINATION_SHARE * len(tones)))])
    held_out -= {emoji.code for emoji in known if "facing right" in emoji.name}
    return {
        "train": [emoji for emoji in known if emoji.code not in held_out],
        "unseen_combination": [emoji for emoji in known if emoji.code in held_out],
        "unseen_concept": [emoji for emoji in table if emoji.family in new and not emoji.has_skin_tone],
    }


def figure(name: str) -> str:
    """The name without its skin tones: what is drawn in several of them."""
    for tone in TONES:
        name = name.replace(tone, "")
    return " ".join(name.split())
