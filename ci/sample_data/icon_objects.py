"""`icon_objects/`: an image folder `{train,val}/<object>/<name>.png` with an artist held out.

The class is the first word of a name, which in all six families says what is drawn ("folder" of "folder-lock"). The
classes are all such words with 20 drawings or more by three or more of the five families that are trained on, and eight
or more by the sixth, which is `val`: a rule made before any training.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

from ci.sample_data import icon_table
from ci.sample_data.icon_table import HELD_OUT_FAMILY, Icon

PACKAGES = icon_table.PACKAGES
LEAST_TRAIN, LEAST_FAMILIES, LEAST_VAL = 20, 3, 8


def build(archives: dict[str, Path], folder: Path) -> None:
    """Write the set into the empty `folder`."""
    for name, icons in objects(icon_table.read(archives)).items():
        for icon in icons:
            path = folder / ("val" if icon.family == HELD_OUT_FAMILY else "train") / name / f"{icon.slug}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            icon.drawing.convert("RGB").save(path)


def objects(icons: Iterable[Icon]) -> dict[str, list[Icon]]:
    """{class: its icons of all families}."""
    drawn: dict[str, list[Icon]] = defaultdict(list)
    for icon in icons:
        drawn[icon.concept.split()[0]].append(icon)
    return {name: drawn[name] for name in sorted(drawn) if _is_class(drawn[name])}


def _is_class(icons: list[Icon]) -> bool:
    families = [icon.family for icon in icons if icon.family != HELD_OUT_FAMILY]
    return (
        len(families) >= LEAST_TRAIN
        and len(set(families)) >= LEAST_FAMILIES
        and len(icons) - len(families) >= LEAST_VAL
    )
