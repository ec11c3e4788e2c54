"""COCO 2017 captions, from the zips of cocodataset.org or from what somebody unpacked.

Accepted below `data_dir`, for each of train2017.zip, val2017.zip and annotations_trainval2017.zip: the zip itself, the
folder it unpacks to (train2017/, annotations/), or that folder inside one named after the zip. test2017.zip and
image_info_test2017.zip carry no captions and are not needed.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import stat
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from clip_pretraining.data import left_out
from clip_pretraining.data.left_out import drop_bad_captions
from clip_pretraining.data.pairs import Pairs, Pictures
from clip_pretraining.data.texts import Texts
from common.errors import UsageError

ANNOTATIONS = "annotations_trainval2017"


def find_split(data_dir: str | Path, split: str, cache_dir: str | Path | None = None) -> tuple[Path, Path]:
    """The captions file of "train" or "val" and the folder of its pictures, unpacked when need be.

    Args:
        data_dir: folder with the zips or the unpacked folders.
        cache_dir: where zips are unpacked; default beside them.
    """
    data_dir = Path(data_dir)
    if not data_dir.is_dir():
        raise UsageError(f"--data_dir {data_dir}: no such folder")
    images = locate(data_dir, f"{split}2017", f"{split}2017", cache_dir)
    captions = f"captions_{split}2017.json"
    return locate(data_dir, ANNOTATIONS, "annotations", cache_dir, captions) / captions, images


def read_captions(
    json_file: Path, image_dir: Path, name: str, limit: float = left_out.LIMIT, listing: Path | None = None
) -> Pairs:
    """Pairs from one COCO captions file."""
    try:
        content = json.loads(json_file.read_text(encoding="utf-8"))
        row_of_image = {image["id"]: row for row, image in enumerate(content["images"])}
        captions = [_caption(annotation) for annotation in content["annotations"]]
        owner = [row_of_image[annotation["image_id"]] for annotation in content["annotations"]]
        names = [image["file_name"] for image in content["images"]]
    except FileNotFoundError:
        raise UsageError(f"{json_file}: missing; take it out of {ANNOTATIONS}.zip") from None
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise UsageError(f"{json_file}: not valid JSON ({error}); copy it again") from None
    except (KeyError, TypeError) as error:
        raise UsageError(f"{json_file}: not a COCO captions file (lacks {error})") from None
    except ValueError as error:
        raise UsageError(f"{json_file}: {error}") from None
    files = Texts.of(names)
    pairs = Pairs(name, Pictures(files, str(image_dir)), captions, owner, files)
    return drop_bad_captions(pairs, str(json_file), limit, listing)


def _caption(annotation: dict) -> str:
    caption = annotation["caption"]
    if caption is not None and not isinstance(caption, str):
        raise ValueError(f"the caption of annotation {annotation.get('id')} is not text but {caption!r}")
    return caption or ""


def locate(data_dir: Path, archive: str, folder: str, cache_dir: str | Path | None, holds: str = "*") -> Path:
    """The unpacked `folder` of `archive`.zip, unpacking it first when there is only the zip.

    holds: pattern of a file by which the folder is known: image_info_test2017.zip, too, unpacks to annotations/.
    """
    for candidate in (data_dir / folder, data_dir / archive / folder):
        if candidate.is_dir() and any(candidate.glob(holds)):
            return candidate
    packed = data_dir / f"{archive}.zip"
    if not packed.is_file():
        if (data_dir / folder).is_dir() and holds != "*":
            raise UsageError(f"{data_dir / folder / holds}: missing; take it out of {packed.name}")
        raise UsageError(
            f"{data_dir}: neither {folder}/ nor {archive}/{folder}/ nor {archive}.zip is there "
            f"(found: {', '.join(sorted(p.name for p in data_dir.iterdir())[:8]) or 'nothing'})"
        )
    target = Path(cache_dir) if cache_dir else data_dir
    try:
        target.mkdir(parents=True, exist_ok=True)
        with _lock(target / f".{archive}.lock"):
            if not any((target / folder).glob(holds)):  # another process may have been first
                unpack(packed, folder, target)
    except PermissionError:
        raise UsageError(
            f"{target}: cannot be written to, and {packed.name} must be unpacked: give --cache_dir"
        ) from None
    return target / folder


def unpack(packed: Path, folder: str, target: Path) -> None:
    """Unpacks `folder` of the zip to target/folder: all of it, or nothing.

    Raises:
        UsageError: truncated or damaged zip, a member that would land outside, no such folder in it, or a full disk.
    """
    staging = target / f".{folder}.unpacking"
    shutil.rmtree(staging, ignore_errors=True)  # of a process that died: we hold the lock
    try:
        with zipfile.ZipFile(packed) as archive:
            members = [m for m in archive.infolist() if not m.is_dir()]
            for member in members:
                _refuse_escape(packed, member)
            wanted = [m for m in members if PurePosixPath(m.filename).parts[0] == folder]
            if not wanted:
                raise UsageError(f"{packed}: holds no folder {folder}/")
            needed = sum(m.file_size for m in wanted)
            if needed > shutil.disk_usage(target).free:
                raise UsageError(f"{packed}: unpacking needs {needed >> 20} MiB in {target}: give another --cache_dir")
            print(f"unpacking {packed} to {target / folder} ({needed >> 20} MiB)", flush=True)
            archive.extractall(staging, wanted)  # checks each member's CRC
        if (target / folder).is_dir():  # of another zip with the same folder
            for path in (staging / folder).iterdir():
                os.replace(path, target / folder / path.name)
        else:
            (staging / folder).rename(target / folder)
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError) as error:  # RuntimeError: encrypted, unknown method
        raise UsageError(f"{packed}: truncated or damaged ({error}); copy it again") from None
    except OSError as error:
        if isinstance(error, PermissionError):
            raise
        raise UsageError(f"{packed}: cannot be unpacked to {target}: {error}") from None
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _refuse_escape(packed: Path, member: zipfile.ZipInfo) -> None:
    path = PurePosixPath(member.filename.replace("\\", "/"))
    if path.is_absolute() or ".." in path.parts or stat.S_ISLNK(member.external_attr >> 16):
        raise UsageError(
            f"{packed}: member {member.filename!r} would be written outside the folder: refused, "
            "fetch the zip from cocodataset.org again"
        )


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    """One process at a time; the kernel frees the lock of a process that dies."""
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        try:
            yield
        finally:
            path.unlink(missing_ok=True)
