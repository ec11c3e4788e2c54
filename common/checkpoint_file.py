"""Checkpoints: written whole or not at all, checked by digest, found again after a crash, loaded without foreign code.

    save(state, folder / "checkpoint-1200.pt"); keep_newest(folder, 3)     # a file, with its digest at its end
    path = newest(folder, "checkpoint-*.pt", keys=("model", "optimizer"))  # passes over damaged and foreign ones
    state = load(path)                                                     # CheckpointError names file and cause
    seal(folder / "checkpoint-1200"); damage(folder_or_file)  # a folder of files, likewise

The digest is SHA-256 of all bytes before it, which processors compute at 1 to 2 GB/s; any other reader of torch's files
skips it. Files without one (of earlier versions, published weights) load unchecked. This file knows files, not models.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import pickle
import re
import shutil
import tempfile
import time
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

import torch

SEAL = "seal.json"  # of a folder, written last: one without it was cut short
_MARK = b"\nsha256:"
_TRAILER = len(_MARK) + 64
_ZIP, _ZIP_END = b"PK\x03\x04", b"PK\x05\x06"
_CHUNK = 1 << 22
_UMASK = os.umask(
    0
)  # asked once: it can only be asked by setting it, for all threads, and checkpoints are written by one
os.umask(_UMASK)
_found_good: set[tuple] = set()  # files as they were when their digest was checked


class CheckpointError(ValueError):
    """A checkpoint that is missing, damaged, foreign or not safe to load. The message names the file and what to do."""

    for_user = True


class _Digesting:
    """Passes what is written on to a file and keeps its digest, and the error that torch would wrap into its own."""

    def __init__(self, file: BinaryIO):
        self.file, self.digest = file, hashlib.sha256()
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            self.file.write(data)
        except OSError as error:
            self.error = error
            raise
        self.digest.update(data)
        return len(data)

    def flush(self) -> None:
        self.file.flush()


def save(obj: Any, path: str | Path) -> Path:
    """Writes `obj` with `torch.save` so that `path` holds either the old content or all of the new, whenever we crash.

    Temporary file in the same folder, with the digest at its end -> fsync -> rename -> fsync of the folder.

    Raises:
        OSError: naming the path, e.g. where the disk is full; what `path` held before is still there.
    """
    path = Path(path)
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
        with os.fdopen(handle, "wb") as file:
            writer = _Digesting(file)
            try:
                torch.save(obj, writer)
            except RuntimeError:
                raise writer.error or RuntimeError(f"{path}: torch could not write it") from None
            file.write(_MARK + writer.digest.hexdigest().encode())
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_UMASK)  # mkstemp made it private; give it the mode a plain open() would
        os.replace(temporary, path)
        sync(path.parent)
    except BaseException as error:
        if temporary is not None:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
        if isinstance(error, OSError) and error.errno is not None:
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise
    _found_good.add(_state_of(path))
    return path


def sync(path: Path) -> None:
    """A file's or folder's content reaches the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def load(path: str | Path, map_location: Any = "cpu", allow: Sequence[type] = (), mmap: bool = False) -> Any:
    """Loads a checkpoint with `weights_only=True` after checking its digest; tensors land on the CPU unless told else.

    Args:
        path: the file.
        map_location: as in `torch.load`.
        allow: further harmless classes the file may hold. `argparse.Namespace` always may: MAE and BEiT keep their
            options in it.
        mmap: tensors stay in the file until they are used.

    Raises:
        CheckpointError: missing, damaged, no checkpoint at all, or holding something other than weights and values.
    """
    path = Path(path)
    if problem := _damage_of_file(path):
        raise CheckpointError(f"{path}: {problem}")
    try:
        with torch.serialization.safe_globals([argparse.Namespace, *allow]), warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=ResourceWarning)
            return torch.load(path, map_location=map_location, weights_only=True, mmap=mmap)
    except pickle.UnpicklingError as error:
        wanted = re.search(r"(?:GLOBAL|Unsupported (?:class|global)[^A-Za-z_]*)\s*([\w.]+)", str(error))
        if wanted is None:
            found = re.search(r"WeightsUnpickler error: (.{,100})", str(error))
            reason = found[1].strip() if found else "no file of torch"
            raise CheckpointError(f"{path}: not a readable checkpoint, or is refused ({reason})") from error
        raise CheckpointError(
            f"{path}: wants to run {wanted[1]} while loading. Only tensors and plain values are loaded, since a pickle "
            "can run any code; if you trust its author, re-save its state_dict with torch.save and use that file"
        ) from error
    except Exception as error:  # a damaged file makes torch raise anything from KeyError to MemoryError
        reason = (str(error) or type(error).__name__).splitlines()[0][:200]
        raise CheckpointError(f"{path}: not a readable checkpoint, maybe cut short ({reason})") from error


def damage(path: str | Path) -> str | None:
    """What is wrong with a checkpoint file or sealed folder, in words; None where its digests are right.

    A file without a digest is not looked into. Digests once found right are not computed again while size, time and
    inode stay.
    """
    path = Path(path)
    return _damage_of_folder(path) if path.is_dir() else _damage_of_file(path)


def no_weights(path: str | Path) -> str | None:
    """What a file is that was saved in place of weights (a web page, an error in XML, a Git LFS pointer, nothing)."""
    with open(path, "rb") as file:
        start = file.read(512).lstrip(b"\xef\xbb\xbf \t\r\n")
    if not start:
        return "an empty file"
    text = " ".join(start[:80].decode("utf-8", "replace").split())
    if start.startswith(b"<"):
        kind = "a web page (HTML)" if re.match(rb"<(!doctype )?html", start, re.IGNORECASE) else "an XML or HTML text"
        return f"{kind}, not weights: the server answered with a page or an error; it begins with {text!r}"
    if start.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer, not weights: fetch the file itself with git lfs pull"
    return None


def _damage_of_file(path: Path) -> str | None:
    if not path.is_file():
        return "no such checkpoint file"
    try:
        if problem := no_weights(path):
            return problem
        state = _state_of(path)
        if state in _found_good:
            return None
        with open(path, "rb") as file:
            is_zip = file.read(4) == _ZIP
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - _TRAILER))
            end = file.read()
            if end.startswith(_MARK):
                file.seek(0)
                if _digest(file, size - _TRAILER).encode() != end[len(_MARK) :]:
                    return "not a readable checkpoint: damaged, it is not what was written (its digest differs)"
                _found_good.add(state)
            elif is_zip and not _ends_as_a_zip(end):
                return "not a readable checkpoint: cut short, or damaged at its end"
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    return None


def _ends_as_a_zip(end: bytes) -> bool:
    """Whether the directory that ends a zip is there, with nothing after it but the comment that it announces."""
    at = end.rfind(_ZIP_END)
    return at >= 0 and len(end) - at - 22 == int.from_bytes(end[at + 20 : at + 22], "little")


def _state_of(path: Path) -> tuple:
    stat = path.stat()
    return (os.path.abspath(path), stat.st_ino, stat.st_size, stat.st_mtime_ns)


def _digest(file: BinaryIO, size: int) -> str:
    digest = hashlib.sha256()
    while size > 0 and (data := file.read(min(_CHUNK, size))):
        digest.update(data)
        size -= len(data)
    return digest.hexdigest()


# -- folders ---------------------------------------------------------------------------------------------------------


def seal(folder: str | Path, files: dict[str, list] | None = None) -> None:
    """Marks a checkpoint folder as whole: its files reach the disk, then `seal.json` with their sizes and digests does.

    Args:
        folder: where everything else is written already. One that is written anew is unsealed first (`unseal`).
        files: of `digests_of`, where the ranks have computed them; by default this process does.

    Raises:
        OSError: naming the path.
    """
    folder = Path(folder)
    files = digests_of(folder) if files is None else files
    content = json.dumps({"files": files}, ensure_ascii=False)
    partial = folder / f".{SEAL}.tmp"
    partial.write_bytes(content.encode() + _MARK + hashlib.sha256(content.encode()).hexdigest().encode())
    sync(partial)
    os.replace(partial, folder / SEAL)
    sync(folder)


def unseal(folder: str | Path) -> None:
    """A folder that is about to be written again is not whole while that lasts."""
    (Path(folder) / SEAL).unlink(missing_ok=True)


def digests_of(folder: str | Path, names: Sequence[str] | None = None, flush: bool = True) -> dict[str, list]:
    """{relative path: [size, digest]} of files below a folder, flushed to the disk; read by several threads.

    Args:
        flush: off where files are only read; not every file system that cannot be written takes it.
    """
    folder = Path(folder)
    if names is None:
        below = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
        names = sorted(name for name in below if name not in (SEAL, f".{SEAL}.tmp"))

    def look(name: str) -> list:
        if flush:
            sync(folder / name)
        with open(folder / name, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            return [size, _digest(file, size)]

    with ThreadPoolExecutor(8) as threads:  # hashing lets go of Python's lock
        return dict(zip(names, threads.map(look, names), strict=True))


def _read_seal(folder: Path) -> dict[str, Any]:
    try:
        content, _, digest = (folder / SEAL).read_bytes().rpartition(_MARK)
    except OSError as error:
        raise CheckpointError(
            f"{folder}: not a whole checkpoint ({SEAL}: {error.strerror}); take an earlier one"
        ) from error
    if hashlib.sha256(content).hexdigest().encode() != digest:
        raise CheckpointError(f"{folder}: its {SEAL} is damaged")
    return json.loads(content)


def _damage_of_folder(folder: Path) -> str | None:
    if not (folder / SEAL).is_file():
        return f"cut short while it was being written, or by an earlier version (it has no {SEAL})"
    try:
        files = _read_seal(folder)["files"]
        new = {name: entry for name, entry in files.items() if _state_of(folder / name) not in _found_good}
        for name, (size, _) in new.items():
            if (folder / name).stat().st_size != size:
                return f"{name} has {(folder / name).stat().st_size} bytes, {size} were written"
        found = digests_of(folder, list(new), flush=False)
        for name, entry in new.items():
            if found[name] != entry:
                return f"{name} is damaged: its content is not what was written (its digest differs)"
            _found_good.add(_state_of(folder / name))
    except CheckpointError as error:
        return str(error).removeprefix(f"{folder}: ")
    except OSError as error:
        return f"{os.path.basename(error.filename or '')} cannot be read ({error.strerror})"
    return None


# -- the newest of a folder ------------------------------------------------------------------------------------------


def newest(folder: str | Path, pattern: str = "*.pt", keys: Sequence[str] = ()) -> Path | None:
    """The newest whole checkpoint of a folder, or None: of files, or where the pattern matches them of sealed folders.

    Newest by the last number in the name (`checkpoint-1200.pt`), not by file time: a copied or touched file must not
    win. One that is damaged, cut short, or a file without the top-level `keys`, is passed over with a warning.
    """
    for path in sorted(Path(folder).glob(pattern), key=number, reverse=True):
        problem = damage(path) or (None if path.is_dir() else _foreign(path, keys))
        if problem is None:
            return path
        warnings.warn(f"{path}: {problem}; an older checkpoint is looked for", stacklevel=2)
    return None


def _foreign(path: Path, keys: Sequence[str]) -> str | None:
    try:
        content = load(path, mmap=path.open("rb").read(4) == _ZIP)
    except CheckpointError as error:
        return str(error).removeprefix(f"{path}: ")
    missing = [key for key in keys if not (isinstance(content, dict) and key in content)]
    return f"no checkpoint of such a run (it has no {', '.join(missing)})" if missing else None


def keep_newest(folder: str | Path, count: int, pattern: str = "*.pt") -> None:
    """Deletes all but the `count` newest whole numbered checkpoints; those named best or last are never touched.

    Damaged ones do not count and stay, so that with one kept there is always a whole one.
    """
    if count <= 0:
        return
    numbered = [p for p in Path(folder).glob(pattern) if number(p) >= 0 and not re.search("best|last", p.name)]
    for path in [p for p in sorted(numbered, key=number) if damage(p) is None][:-count]:
        remove(path)


def remove(path: Path) -> None:
    """Deletes a checkpoint; a folder loses its seal first, so that half of it is never taken for a whole one."""
    if path.is_dir():
        unseal(path)
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def set_aside_newer(path: Path, pattern: str = "*.pt") -> list[Path]:
    """Moves checkpoints numbered above `path`, which a run goes on from, to `earlier/<time>/`; returns their old paths.

    They are of a future that will be different: left there, the next restart would take them for the newest.
    """
    newer = [p for p in path.parent.glob(pattern) if number(p) > number(path) and not re.search("best|last", p.name)]
    aside = path.parent / "earlier" / time.strftime("%Y%m%d-%H%M%S")
    for old in newer:
        aside.mkdir(parents=True, exist_ok=True)
        os.replace(old, aside / old.name)
    return newer


def number(path: Path) -> int:
    """The last number in a checkpoint's name, -1 without one."""
    numbers = re.findall(r"\d+", path.stem if path.suffix in (".pt", ".pth") else path.name)
    return int(numbers[-1]) if numbers else -1
