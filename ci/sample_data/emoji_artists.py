"""`images_artists/` (optional, needs npm): the emoji of `images/`, as seven artists draw them.

Twemoji and OpenMoji (PyPI); Noto and the earlier Noto, Fluent, EmojiOne 2 and 1 (Iconify's packages of npm); in colour.
A family of emoji is on one side in all of their drawings. Iconify names drawings by Unicode's names; two packages say
which name is which code point, and the others use the same names.
"""

from __future__ import annotations

import json
import tarfile
from collections.abc import Callable
from pathlib import Path

from PIL import Image

from ci.sample_data import emoji_table, image_folder, openmoji_folder
from ci.sample_data.packages import EMOJIONE, EMOJIONE_V1, FLUENT, NOTO, NOTO_V1

_ICONIFY = {"noto": NOTO, "noto_v1": NOTO_V1, "fluent": FLUENT, "emojione": EMOJIONE, "emojione_v1": EMOJIONE_V1}
_SVG = '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" viewBox="{box}">{body}</svg>'
PACKAGES = (*openmoji_folder.PACKAGES, *_ICONIFY.values())


def build(archives: dict[str, Path], folder: Path) -> None:
    """Write the set into the empty `folder`."""
    image_folder.write(archives, folder, lambda emoji: emoji.picture(), "twemoji-")
    with openmoji_folder.drawings(archives) as draw:
        image_folder.write(archives, folder, draw, "openmoji-")
    code_of: dict[str, str] = {}
    for package in _ICONIFY.values():
        codes = _read(archives[package.name], "chars.json")
        code_of |= {name: emoji_table.plain_code(code) for code, name in codes.items()}
    for artist, package in _ICONIFY.items():
        image_folder.write(archives, folder, _drawings(archives[package.name], code_of), f"{artist}-")


def _drawings(archive: Path, code_of: dict[str, str]) -> Callable[[emoji_table.Emoji], Image.Image | None]:
    """What draws an emoji as this package has it, or gives None."""
    icons = _read(archive, "icons.json")
    sides = icons.get("width", 16), icons.get("height", 16)
    found = {code_of[name]: icon for name, icon in icons["icons"].items() if name in code_of}

    def draw(emoji: emoji_table.Emoji) -> Image.Image | None:
        if emoji.code not in found:
            return None
        icon = found[emoji.code]
        box = [icon.get("left", 0), icon.get("top", 0), icon.get("width", sides[0]), icon.get("height", sides[1])]
        return openmoji_folder.drawn(_SVG.format(box=" ".join(map(str, box)), body=icon["body"]))

    return draw


def _read(archive: Path, name: str) -> dict:
    with tarfile.open(archive) as tar:
        return json.load(tar.extractfile(f"package/{name}"))
