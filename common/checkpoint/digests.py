"""Whether a checkpoint is what was written: a digest at the end of a file, a seal with the digests of a folder's files.

    writer = Digesting(file); ...; file.write(writer.trailer())          # a file, as checkpoint_file.save does
    seal(folder)                                                          # a folder, once everything in it is written
    damage(file_or_folder)                                                # what is wrong in words, or None

The digest is SHA-256 of all bytes before it, which processors compute at 1 to 2 GB/s; any other reader of torch's files
skips it. Files without one (of earlier versions, published weights) are not looked into.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

SEAL = "seal.json"  # of a folder, written last: one without it was cut short
ZIP = b"PK\x03\x04"
_ZIP_END = b"PK\x05\x06"
_MARK = b"\nsha256:"
_TRAILER = len(_MARK) + 64
_CHUNK = 1 << 22
_found_good: set[tuple] = set()  # files as they were when their digest was checked
# files of other programs that a user may take for weights, by the end of their name
_OF_OTHERS = {
    ".onnx": "an ONNX model, which is for inference elsewhere",
    ".h5": "a file of Keras",
    ".keras": "a file of Keras",
    ".npz": "arrays of numpy, as JAX programs keep them",
    ".msgpack": "a file of Flax",
    ".gguf": "a file of llama.cpp",
    ".pdparams": "a file of Paddle",
}


class Digesting:
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

    def trailer(self) -> bytes:
        return _MARK + self.digest.hexdigest().encode()


def damage(path: str | Path) -> str | None:
    """What is wrong with a checkpoint file or sealed folder, in words; None where its digests are right.

    A file without a digest is not looked into. Digests once found right are not computed again while size, time and
    inode stay.
    """
    path = Path(path)
    return _damage_of_folder(path) if path.is_dir() else damage_of_file(path)


def no_weights(path: str | Path) -> str | None:
    """What a file is that was saved in place of weights (a web page, an error in XML, a Git LFS pointer, nothing), or
    by its name another program's."""
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
    if program := _OF_OTHERS.get(Path(path).suffix):
        return f"{program}, which is not read here; give the PyTorch checkpoint of the same weights"
    return None


def damage_of_file(path: Path) -> str | None:
    if not path.is_file():
        return "no such checkpoint file"
    try:
        if problem := no_weights(path):
            return problem
        state = _state_of(path)
        if state in _found_good:
            return None
        with open(path, "rb") as file:
            is_zip = file.read(4) == ZIP
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


def _damage_of_folder(folder: Path) -> str | None:
    if not (folder / SEAL).is_file():
        return f"cut short while it was being written, or by an earlier version (it has no {SEAL})"
    try:
        content, _, digest = (folder / SEAL).read_bytes().rpartition(_MARK)
        if hashlib.sha256(content).hexdigest().encode() != digest:
            return f"its {SEAL} is damaged"
        files = json.loads(content)["files"]
        new = {name: entry for name, entry in files.items() if _state_of(folder / name) not in _found_good}
        for name, (size, _) in new.items():
            if (folder / name).stat().st_size != size:
                return f"{name} has {(folder / name).stat().st_size} bytes, {size} were written"
        found = digests_of(folder, list(new), flush=False)
        for name, entry in new.items():
            if found[name] != entry:
                return f"{name} is damaged: its content is not what was written (its digest differs)"
            found_good(folder / name)
    except OSError as error:
        return f"{os.path.basename(error.filename or '')} cannot be read ({error.strerror})"
    return None


def found_good(path: Path) -> None:
    """A file that this process has written itself, or whose digest it has checked, need not be read once more."""
    _found_good.add(_state_of(path))


def _state_of(path: Path) -> tuple:
    stat = path.stat()
    return (os.path.abspath(path), stat.st_ino, stat.st_size, stat.st_mtime_ns)


def _digest(file: BinaryIO, size: int) -> str:
    digest = hashlib.sha256()
    while size > 0 and (data := file.read(min(_CHUNK, size))):
        digest.update(data)
        size -= len(data)
    return digest.hexdigest()


def sync(path: Path) -> None:
    """A file's or folder's content reaches the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
