"""Figures as files, drawn without a display, in fonts that have the script of what they say.

matplotlib's own font has no Chinese, Japanese or Korean character.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

# of Linux distributions, Windows and macOS; the first that is installed and has most of what is missing
WIDE_FONTS = (
    "Noto Sans CJK SC", "Noto Sans CJK JP", "Noto Sans SC", "Source Han Sans SC", "Source Han Sans CN",
    "WenQuanYi Zen Hei", "WenQuanYi Micro Hei", "Droid Sans Fallback", "Microsoft YaHei", "SimHei", "PingFang SC",
    "Hiragino Sans GB", "Arial Unicode MS",
)  # fmt: skip


def new(size: tuple[float, float], *grid: int, layout: Any = "constrained", **options: Any) -> tuple[Any, Any]:
    """(figure, axes) without a window.

    Args:
        size: in inches.
        grid: rows and columns of axes.
        options: of `Figure.subplots`.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout=layout)
    return figure, figure.subplots(*grid, **options)


def save(figure: Any, path: Path, **options: Any) -> None:
    """Writes it, and its folder where there is none; `options` are `Figure.savefig`'s."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, **{"dpi": 110} | options)


def picture_rows(
    rows: Sequence[Sequence[np.ndarray]], titles: Sequence[str], path: Path, outlined: Sequence[np.ndarray] = ()
) -> None:
    """Writes rows of pictures [H, W, 3], each row with its title, as one figure.

    Args:
        outlined: bool [h, w] of each picture, the patches around which the last row has a line.
    """
    size = (max(1.6 * len(rows[0]), 2.4), 1.65 * len(rows))
    figure, axes = new(size, len(rows), len(rows[0]), squeeze=False)
    for row, title, line in zip(rows, titles, axes, strict=True):
        for picture, cell in zip(row, line, strict=True):
            cell.imshow(picture)
            cell.set(xticks=[], yticks=[])
        line[0].set_ylabel(title)
    for cell, picture, patches in zip(axes[-1], rows[-1], outlined, strict=False):
        side = len(picture) // len(patches)
        cell.contour(np.kron(patches, np.ones((side, side))), [0.5], colors="black", linewidths=1.2)
    save(figure, path)


@contextlib.contextmanager
def fonts_for(texts: Iterable[str], kind: str = "sans-serif") -> Iterator[None]:
    """While it lasts matplotlib can draw `texts`. Boxes stand for what no font here has, which a note says once.

    Args:
        kind: of the font for what is no such script: "sans-serif" or "monospace".
    """
    import matplotlib
    from matplotlib import font_manager

    def characters_of(family: str) -> set[str]:
        return set(map(chr, font_manager.get_font(font_manager.findfont(family)).get_charmap()))

    family = matplotlib.rcParams[f"font.{kind}"][0]
    missing = {c for text in texts for c in text if c.isprintable() and not c.isspace()} - characters_of(family)
    families = [family]
    if missing:
        _find_new_fonts()
        installed = {font.name for font in font_manager.fontManager.ttflist}
        found = [(len(missing & characters_of(name)), name) for name in WIDE_FONTS if name in installed]
        most, wide = max(found, key=lambda pair: pair[0], default=(0, ""))
        if most:
            families.append(wide)
            missing -= characters_of(wide)
    if missing:
        some = "".join(sorted(missing)[:5])
        print(
            f"note: no font here has {some}: boxes in the picture; install one (apt install fonts-noto-cjk)", flush=True
        )
    with matplotlib.rc_context({"font.family": families}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font", UserWarning)
        yield


def _find_new_fonts() -> None:
    """What was installed since matplotlib wrote down which fonts there are, which it does once."""
    from matplotlib import font_manager

    known = {font.fname for font in font_manager.fontManager.ttflist}
    for path in set(font_manager.findSystemFonts()) - known:
        with contextlib.suppress(OSError, RuntimeError, ValueError):  # one that FreeType cannot read
            font_manager.fontManager.addfont(path)
