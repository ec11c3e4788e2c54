"""`images/`: an image folder `{train,val}/<class>/<name>.png`, the emoji groups being the classes.

One picture per emoji, without the skin-tone variants: with them two thirds of all pictures would be people.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from PIL import Image

from ci.sample_data import emoji_table

PACKAGES = emoji_table.PACKAGES


def build(archives: dict[str, Path], folder: Path) -> None:
    """Write the set into the empty `folder`."""
    write(archives, folder, lambda emoji: emoji.picture())


def write(
    archives: dict[str, Path], folder: Path, draw: Callable[[emoji_table.Emoji], Image.Image | None], prefix: str = ""
) -> None:
    """The set as `draw` draws it, names beginning with `prefix`; emoji for which it has no picture are left out."""
    table = [emoji for emoji in emoji_table.read(archives) if not emoji.has_skin_tone]
    held_out = emoji_table.validation_families(table)
    for emoji in table:
        picture = draw(emoji)
        if picture is None:
            continue
        split = "val" if emoji.family in held_out else "train"
        path = folder / split / emoji_table.slug(emoji.group) / f"{prefix}{emoji.slug}.png"
        if path.exists():  # two names that differ in signs only
            path = path.with_stem(f"{path.stem}_{emoji.code}")
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.save(path)
