"""`coco2017/`: the emoji pictures with captions in the layout of COCO 2017.

`train2017/`, `val2017/` (JPEG, twelve-digit names) and `annotations/captions_{train,val}2017.json`, five captions a
picture as in COCO: the emoji's names first, then sentences made of name and group. Every caption belongs to one picture
only, so that retrieval is well defined. Skin-tone variants are in the training part only, and only those of its own
base emoji. Format: https://cocodataset.org/#format-data (caption annotations).
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

from ci.sample_data import emoji_table
from ci.sample_data.emoji_table import Emoji

PACKAGES = emoji_table.PACKAGES
CAPTIONS_PER_PICTURE = 5
_MAX_NAMES = 3
_SENTENCES = (
    "a picture of {name}",
    "{name} drawn as an emoji",
    "{name}, one of the {group} emoji",
    "a small drawing showing {name}",
)
_INFO = {
    "description": "Emoji pictures with captions, in the COCO 2017 layout",
    "url": "https://github.com/jdecked/twemoji",
    "version": "1.0",
    "year": 2026,
    "contributor": "Twemoji, Copyright Twitter, Inc and other contributors",
    "date_created": "2026/11/21",
}
_LICENSES = [{"id": 1, "name": "CC-BY 4.0", "url": "https://creativecommons.org/licenses/by/4.0/"}]


def build(archives: dict[str, Path], folder: Path) -> None:
    """Write the set into the empty `folder`."""
    table = emoji_table.read(archives)
    held_out = emoji_table.validation_families(table)
    ambiguous = ambiguous_names(table)
    numbered = list(enumerate(table, start=1))
    val = [(i, e) for i, e in numbered if e.family in held_out and not e.has_skin_tone]
    train = [(i, e) for i, e in numbered if e.family not in held_out]
    (folder / "annotations").mkdir()
    for split, rows in (("train2017", train), ("val2017", val)):
        (folder / split).mkdir()
        images, annotations = [], []
        for image_id, emoji in rows:
            images.append(_write_picture(image_id, emoji, folder / split))
            annotations += [
                {"image_id": image_id, "id": image_id * CAPTIONS_PER_PICTURE + k, "caption": caption}
                for k, caption in enumerate(captions(emoji, ambiguous))
            ]
        content = {"info": _INFO, "licenses": _LICENSES, "images": images, "annotations": annotations}
        (folder / "annotations" / f"captions_{split}.json").write_text(json.dumps(content))


def captions(emoji: Emoji, ambiguous: set[str]) -> list[str]:
    """Five different captions; `ambiguous` are names that more than one picture has."""
    names = [emoji.name, *(alias for alias in emoji.aliases if alias.lower() not in ambiguous)][:_MAX_NAMES]
    sentences = [s.format(name=emoji.name, group=emoji.group.replace("&", "and").lower()) for s in _SENTENCES]
    return (names + sentences)[:CAPTIONS_PER_PICTURE]


def ambiguous_names(table: list[Emoji]) -> set[str]:
    """Names and aliases, in lower case, that more than one emoji has."""
    count = Counter(n.lower() for emoji in table for n in {emoji.name, *emoji.aliases})
    return {name for name, times in count.items() if times > 1}


def _write_picture(image_id: int, emoji: Emoji, folder: Path) -> dict[str, object]:
    picture = emoji.picture()
    name = f"{image_id:012d}.jpg"
    picture.save(folder / name, quality=95, subsampling=0)
    return {
        "license": 1,
        "file_name": name,
        "coco_url": "",
        "height": picture.height,
        "width": picture.width,
        "date_captured": "",
        "flickr_url": "",
        "id": image_id,
    }
