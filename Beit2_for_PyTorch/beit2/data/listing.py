"""Which pictures a folder has: listed by one rank, kept beside the data, never with a validation set in it unsaid."""

from __future__ import annotations

import os
import time
from pathlib import Path

from beit2.data import kept_list
from beit2.data.picture_list import PictureList
from beit2.data.tars import Listed, list_tars, words_of
from common.data import pictures
from common.distributed import broadcast_object, rank
from common.errors import UsageError

EXTENSIONS = pictures.SUFFIXES
CACHE = ".beit2_pictures"
CACHED_FROM = 10_000  # pictures: fewer are listed in no time
_TRAINING = {"train", "training", "train2014", "train2017"}
_HELD_OUT = {"val", "valid", "validation", "test", "testing", "dev", "val2014", "val2017", "test2014", "test2017"}
_HELD_OUT |= {"eval", "evaluation", "heldout", "held_out", "test2015", "valid2017"}
_RACY_NS = 2 * 10**9  # a folder that changed this short before it was listed may change again within its time stamp


def list_pictures(
    root: str | Path, option: str = "--data_path", labelled: bool = False, whole: bool = False
) -> PictureList:
    """All pictures below a folder in sorted order, for all ranks from the main rank's look at the disk.

    A folder that holds tars, or a tar itself, stands for the pictures in them.

    Where training and held-out folders stand side by side (train/ and val/, COCO's train2017/ and val2017/), training
    takes the former only and says so. Hidden files (`._*` of macOS) and __MACOSX are no pictures.

    Args:
        option: where the folder was given, for messages.
        labelled: its folders are classes.
        whole: held-out sets, too: it is not for training.

    Raises:
        UsageError: on all ranks: no such folder, no picture in it, or a choice that only the user can make.
    """
    result: tuple[bytes | Listed, str | None] = (b"", None)
    root = Path(root)
    if rank() == 0:
        try:
            result = _look(root, option, labelled, whole), None
        except UsageError as error:
            result = b"", error.message
        except OSError as error:
            result = b"", (f"{option} {root}: {error.filename or ''} {error.strerror or error}")
    found, problem = broadcast_object(result)
    if problem is not None:
        raise UsageError(problem)
    if isinstance(found, Listed):
        return found.pictures()
    return PictureList(root, found)


def _look(root: Path, option: str, labelled: bool, whole: bool) -> bytes | Listed:
    """The names of pictures in files, or what tars hold."""
    tars = _tars(root, option)
    if not (root.is_dir() or tars):
        raise UsageError(f"{option} {root}: no such folder")
    if tars and labelled:
        raise UsageError(f"{option} {root}: holds tars, and classes are read from folders only: unpack them")
    training = option == "--data_path" and not labelled
    if not (training or whole):
        _refuse_mixed_sets(root, option)
    if tars:
        kept, left_out = _split_tars(tars) if training and not whole else (tars, [])
    else:
        names, left_out = _cached(root, training and not whole)
    if left_out:
        print(
            f"note: {option} {root}: not trained on: {', '.join(left_out)}; name a folder itself to take it", flush=True
        )
    found = list_tars(root if root.is_dir() else root.parent, kept, option) if tars else names
    if not (found.names if tars else found):
        raise UsageError(f"{option} {root}: no pictures in it (looked for {' '.join(EXTENSIONS)})")
    return found


def _tars(root: Path, option: str) -> list[str]:
    """Names of the tars in a folder that holds nothing else to read, or of the one that `root` is."""
    if root.is_file():
        return [root.name] if root.suffix == ".tar" else []
    if not root.is_dir():
        return []
    entries = [entry for entry in os.scandir(root) if not pictures.is_litter(entry.name)]
    tars = sorted(entry.name for entry in entries if entry.name.endswith(".tar"))
    if tars and any(entry.is_dir() or pictures.is_picture(entry.name) for entry in entries):
        # such as the archive that a folder was unpacked from
        print(f"note: {option} {root}: {tars[0]} beside pictures or folders is not read; name a tar to take it")
        return []
    return tars


def _split_tars(tars: list[str]) -> tuple[list[str], list[str]]:
    """Those to train on, and those whose names speak of a held-out set; one kind alone is what was asked for."""
    held_out = [tar for tar in tars if words_of(tar) & _HELD_OUT]
    return ([tar for tar in tars if tar not in held_out], held_out) if len(held_out) < len(tars) else (tars, [])


def _refuse_mixed_sets(root: Path, option: str) -> None:
    found = [entry.name for entry in os.scandir(root) if entry.is_dir()]
    train = [name for name in found if name.lower() in _TRAINING]
    held_out = [name for name in found if name.lower() in _HELD_OUT]
    if train and held_out:
        first, second = root / train[0], root / held_out[0]
        raise UsageError(
            f"{option} {root}: holds {train[0]}/ and {held_out[0]}/, not classes: give {first} and {second} apart"
        )


def _cached(root: Path, split: bool) -> tuple[bytes, list[str]]:
    """Names and what was left out: as kept beside the data while no folder has changed since, else listed anew."""
    for file in kept_list.places(root, CACHE):
        kept = kept_list.read(file)
        if kept is not None and _is_current(kept[0], root, split):
            return kept[1], list(kept[0]["left_out"])
    began = time.time_ns()
    names, times, left_out = _walk(root, split)
    if names.count(b"\0") >= CACHED_FROM and max(times.values()) < began - _RACY_NS:
        _keep(root, {"split": split, "times": times, "left_out": left_out}, names)
    return names, left_out


def _keep(root: Path, header: dict, names: bytes) -> None:
    if os.stat(root).st_mtime_ns != header["times"][""]:
        return
    for file in kept_list.places(root, CACHE):
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.touch()  # which changes the folder's time if it is new; written in place, it does so no more
        except OSError:  # read-only, or full
            continue
        header["times"][""] = os.stat(root).st_mtime_ns
        kept_list.keep([file], header, names)
        return


def _is_current(header: dict, root: Path, split: bool) -> bool:
    try:
        times = header["times"].items()
        return header["split"] == split and all(os.stat(root / folder).st_mtime_ns == kept for folder, kept in times)
    except (OSError, KeyError, AttributeError):
        return False


def _walk(root: Path, split: bool) -> tuple[bytes, dict[str, int], list[str]]:
    """Names of pictures, change times of all folders read, and held-out folders that were left out."""
    names: list[str] = []
    times: dict[str, int] = {}
    left_out: list[str] = []
    above: list[tuple[int, int]] = []  # the folders that this one lies in: a link to one of them would never end

    def read(folder: str) -> None:
        where = os.path.join(root, folder)
        status = os.stat(where)
        place = (status.st_dev, status.st_ino)
        if place in above:
            return
        times[folder] = status.st_mtime_ns
        above.append(place)
        with os.scandir(where) as entries:
            found = sorted((entry.name, entry.is_dir()) for entry in entries)
        found = [(name, is_dir) for name, is_dir in found if not pictures.is_litter(name)]
        kept = _without_held_out(folder, [name for name, is_dir in found if is_dir], left_out) if split else None
        names.extend(
            os.path.join(folder, name) for name, is_dir in found if not is_dir and name.lower().endswith(EXTENSIONS)
        )
        for name, is_dir in found:
            if is_dir and (kept is None or name in kept):
                read(os.path.join(folder, name))
        above.pop()

    read("")
    return b"".join(os.fsencode(name) + b"\0" for name in names), times, left_out


def _without_held_out(folder: str, subfolders: list[str], left_out: list[str]) -> set[str]:
    """The subfolders to read. Beside a training folder nothing else is read at the top, and no held-out set below."""
    train = {name for name in subfolders if name.lower() in _TRAINING}
    held_out = {name for name in subfolders if name.lower() in _HELD_OUT}
    kept = train if train and not folder else set(subfolders) - held_out
    left_out.extend(os.path.join(folder, name) + "/" for name in subfolders if name not in kept)
    return kept
