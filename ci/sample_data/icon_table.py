"""One concept drawn by many artists: the glyphs of six icon fonts with their names, from the wheel of qtawesome.

The fonts lie in the wheel beside tables of names ("bell-off-outline" -> code point); nothing of it is installed. A name
ends with words about the drawing's style (outline, fill, thin); what is left of it is the concept. The wheel also has
Font Awesome 5 and Material Design 5, earlier states of their successors: left out. So are names that stand for a glyph
already taken, and pictures that are pixel for pixel those of an earlier name of the same family.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from ci.sample_data.packages import QTAWESOME

PACKAGES = (QTAWESOME,)
SIDE = 64  # pixels of a picture
HELD_OUT_FAMILY = "remix"
# family -> what its two files are called in the wheel
FAMILIES = {
    "material": ("materialdesignicons6-webfont-6.9.96.ttf", "materialdesignicons6-webfont-charmap-6.9.96.json"),
    "phosphor": ("phosphor-1.3.0.ttf", "phosphor-charmap-1.3.0.json"),
    "remix": ("remixicon-2.5.0.ttf", "remixicon-charmap-2.5.0.json"),
    "fontawesome": ("fontawesome6-solid-webfont-6.7.2.ttf", "fontawesome6-solid-webfont-charmap-6.7.2.json"),
    "codicon": ("codicon-0.0.36.ttf", "codicon-charmap-0.0.36.json"),
    "elusive": ("elusiveicons-webfont-2.0.ttf", "elusiveicons-webfont-charmap-2.0.json"),
}
STYLE_WORDS = frozenset("outline line fill solid thin light bold duotone regular alt variant".split())
_FONT_SIZE = 52
_LONGEST = 60  # pixels of the longer side of a glyph


@dataclass(frozen=True)
class Icon:
    """One drawing: `name` as its artist wrote it, e.g. "bell-off-outline"."""

    family: str
    name: str
    drawing: Image.Image  # grey, SIDE x SIDE, black on white

    @cached_property
    def caption(self) -> str:
        """The name in words: "bell off outline"."""
        return " ".join(_words(self.name))

    @cached_property
    def concept(self) -> str:
        """The caption without the words of style at its end: "bell off". Of "bold" alone nothing is taken away."""
        words = _words(self.name)
        while len(words) > 1 and words[-1] in STYLE_WORDS:
            words.pop()
        return " ".join(words)

    @cached_property
    def words(self) -> frozenset[str]:
        """The words of the concept, in no order: "arrow left" and "left arrow" are one combination."""
        return frozenset(self.concept.split())

    @property
    def slug(self) -> str:
        """A file name: family and name in lower-case ASCII."""
        return f"{self.family}_{'_'.join(_words(self.name))}"


def read(archives: dict[str, Path]) -> list[Icon]:
    """All icons by family and name; `archives` maps the names of PACKAGES to their files."""
    icons = []
    with zipfile.ZipFile(archives[QTAWESOME.name]) as wheel:
        for family, (font_file, names_file) in FAMILIES.items():
            font = ImageFont.truetype(io.BytesIO(wheel.read(f"qtawesome/fonts/{font_file}")), _FONT_SIZE)
            names = json.loads(wheel.read(f"qtawesome/fonts/{names_file}"))
            icons += _drawn(family, names, font)
    return icons


def share_of(text: str) -> float:
    """A number in [0, 1) by which things are held out: a hash, so that a new icon moves no old one."""
    return int(hashlib.sha256(text.encode()).hexdigest()[:8], 16) / 16**8


def _drawn(family: str, names: dict[str, str], font: ImageFont.FreeTypeFont) -> Iterator[Icon]:
    seen: set[bytes] = set()
    for name, code in sorted(names.items()):
        drawing = _draw(chr(int(code, 16)), font)
        pixels = drawing.tobytes()
        if pixels in seen or not _words(name) or drawing.getextrema() == (255, 255):
            continue
        seen.add(pixels)
        yield Icon(family, name, drawing)


def _draw(glyph: str, font: ImageFont.FreeTypeFont) -> Image.Image:
    """The glyph in black, in the middle of a white square; made smaller where its longer side would not fit."""
    left, top, right, bottom = font.getbbox(glyph)
    longest = max(right - left, bottom - top, 1)
    if longest > _LONGEST:
        font = font.font_variant(size=int(_FONT_SIZE * _LONGEST / longest))
        left, top, right, bottom = font.getbbox(glyph)
    picture = Image.new("L", (SIDE, SIDE), 255)
    corner = ((SIDE - right - left) // 2, (SIDE - bottom - top) // 2)
    ImageDraw.Draw(picture).text(corner, glyph, fill=0, font=font)
    return picture


def _words(name: str) -> list[str]:
    return re.findall(r"[a-z0-9]+", name.lower())
