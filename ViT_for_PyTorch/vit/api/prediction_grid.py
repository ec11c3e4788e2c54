"""Predictions as a picture: a grid of what was asked, each with its best labels and their scores as bars."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from common.run.figures import fonts_for, new, save
from vit.api.image_processor import load_image

COLUMNS = 6
MOST = 36  # pictures; more cannot be read at a glance
_RIGHT, _WRONG, _OTHER = "tab:green", "tab:red", "lightgrey"


def draw(predictions: Mapping[str, Sequence[Mapping[str, float | str]]], labels: Sequence[str], target: Path) -> None:
    """Writes a PNG of the first MOST pictures.

    A picture that lies in a folder named like one of `labels` is known to be of that class: its title is green with the
    class where the best label is right, red with both where it is not.

    Args:
        predictions: {file: [{"label": ..., "score": 0..1}, ...], best first}.
        labels: all class names.
    """
    shown = dict(list(predictions.items())[:MOST])
    titles = [name for file in map(Path, shown) for name in (file.stem, file.parent.name)]
    with fonts_for(map(_words, titles + [str(entry["label"]) for found in shown.values() for entry in found])):
        save(_grid(shown, labels), target)


def _grid(shown: Mapping[str, Sequence[Mapping[str, float | str]]], labels: Sequence[str]):
    columns = min(COLUMNS, len(shown))
    rows = -(-len(shown) // columns)
    size = (2.3 * columns, 2.9 * rows)
    figure, axes = new(size, 2 * rows, columns, squeeze=False, height_ratios=[3, 1.2] * rows)
    for axis in axes.flat:
        axis.set_axis_off()
    for index, (file, found) in enumerate(shown.items()):
        row, column = 2 * (index // columns), index % columns
        known = Path(file).parent.name if Path(file).parent.name in labels else None
        axes[row, column].imshow(load_image(file))
        colour = {None: "black", found[0]["label"]: _RIGHT}.get(known, _WRONG)
        axes[row, column].set_title(_words(known or Path(file).stem), fontsize=9, color=colour)
        _bars(axes[row + 1, column], found, known)
    return figure


def _bars(axis, found: Sequence[Mapping[str, float | str]], known: str | None) -> None:
    """Up to three labels with their scores; the right one is green."""
    found = found[:3]
    for place, entry in enumerate(found):
        wrong = _WRONG if place == 0 and known is not None else _OTHER
        axis.barh(-place, entry["score"], color=_RIGHT if entry["label"] == known else wrong, height=0.8, alpha=0.5)
        axis.text(0.01, -place, f"{_words(str(entry['label']))} {100 * entry['score']:.0f} %", va="center", fontsize=8)
    axis.set(xlim=(0, 1), ylim=(-2.5, 0.5))


def _words(name: str) -> str:
    return name.replace("_", " ")[:28].encode("utf-8", "backslashreplace").decode()
