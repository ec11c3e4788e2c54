"""Which pictures cannot be read: each is decoded once, and the verdict kept until its file changes.

Every rank looks at its share and waits for the others in no collective, so it may take hours. What is done is written
down piece by piece: a check that was ended goes on where it was.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from torch.utils.data import DataLoader, Dataset

from clip_pretraining.data import left_out, remote
from clip_pretraining.data.batches import one_thread
from clip_pretraining.data.images import ImageError, decode_image
from clip_pretraining.data.pairs import Pairs, Pictures, relative_to
from common import distributed

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp", "bmp")


def check_images(pairs: Pairs, workers: int, cache_dir: Path, decode: bool = True) -> tuple[dict[int, str], str]:
    """({position: reason} of the pictures that cannot be read, a digest of the files' state), on all ranks.

    Args:
        workers: processes that decode.
        cache_dir: where verdicts are kept, `checked_NAME.RANK.jsonl`, of all sets of that name.
        decode: False looks at the files' sizes and times only.
    """
    images, rank, ranks = pairs.images, distributed.rank(), distributed.world_size()
    # pictures a piece, whatever the number of ranks; a power of two, so that a set that grows keeps its pieces
    size = min(max(64, 1 << (len(images) // 1024).bit_length()), 4096)
    pieces = [range(start, min(start + size, len(images))) for start in range(0, len(images), size)]
    mine = {number: _state(images, pieces[number]) for number in range(rank, len(pieces), ranks)}
    bad: dict[int, str] = {}
    if decode:
        known = _verdicts(cache_dir, f"checked_{pairs.name}")
        todo = []
        for number, state in mine.items():
            if (number, state) in known:
                bad |= known[number, state]
            else:
                todo.append(number)
        with _Ledger(cache_dir / f"checked_{pairs.name}.{rank}.jsonl") as ledger:
            for number, found in _looked_at(images, pieces, todo, workers):
                bad |= found
                ledger.write(number, mine[number], found)
        distributed.wait_for_all()
    answers = distributed.gather_objects((mine, bad))
    states = dict(sorted(chain.from_iterable(share.items() for share, _ in answers)))
    return {i: reason for _, share in answers for i, reason in share.items()}, _digest(states.values())


def _state(images: Pictures, piece: range) -> str:
    """What the piece's files are now: their names, sizes and times; of tars also where in them."""
    rows, places = slice(piece.start, piece.stop), []
    if images.file_of is None:
        files = images.files[rows]
    else:
        files = [images.files[i] for i in np.unique(images.file_of[rows]).tolist()]
        places = [values[rows].tobytes().hex() for values in (images.file_of, images.offset, images.length)]
    paths = [relative_to(images.root, file) for file in files]
    return _digest([*(f"{path} {file_stamp(path)}" for path in paths), *places])


def _digest(texts: Iterable[str]) -> str:
    return hashlib.blake2b("\n".join(texts).encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()


def _looked_at(
    images: Pictures, pieces: Sequence[range], todo: Sequence[int], workers: int
) -> Iterator[tuple[int, dict[int, str]]]:
    """(piece, what is wrong with which of its pictures), said every half a minute by the main rank."""
    order = np.concatenate([np.asarray(pieces[number]) for number in todo] or [np.zeros(0, dtype=np.int64)])
    loader = DataLoader(_Check(images, order), batch_size=None, num_workers=workers, worker_init_fn=one_thread)
    reasons = iter(loader)
    last, broken, done = time.monotonic(), 0, 0
    for number in todo:
        found = {}
        for position in pieces[number]:
            if reason := next(reasons):
                found[position] = reason
            done += 1
            if time.monotonic() - last > 30 and distributed.rank() == 0:
                last = time.monotonic()
                counts = f"{done:,} of this process's {len(order):,}, {broken + len(found)} cannot be read"
                print(f"checking pictures: {counts}", flush=True)
        broken += len(found)
        yield number, found


class _Check(Dataset):
    def __init__(self, images: Pictures, order: np.ndarray):
        self.images, self.order = images, order

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, index: int) -> str:
        ref = self.images[int(self.order[index])]
        try:
            decode_image(ref.read(), 8, ref.name)
        except ImageError as error:
            return str(error)
        return ""


class _Ledger:
    """Verdicts of this process, a line each as they come; where they cannot be kept, a note."""

    def __init__(self, path: Path):
        self.path = path
        self.file: TextIO | None = None
        self.failed = False

    def __enter__(self) -> _Ledger:
        return self

    def write(self, number: int, state: str, bad: dict[int, str]) -> None:
        if self.failed:
            return
        try:
            if self.file is None:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self.file = open(self.path, "a", encoding="utf-8")
                self.file.write("\n")  # behind a line that was cut short
            self.file.write(json.dumps([number, state, bad]) + "\n")
            self.file.flush()
        except OSError as error:
            self.failed = True
            _cannot_be_kept("the check of the pictures", self.path.parent, error)

    def __exit__(self, *_: object) -> None:
        if self.file is not None:
            self.file.close()


def _verdicts(cache_dir: Path, stem: str) -> dict[tuple[int, str], dict[int, str]]:
    """{(piece, its state then): {position: reason}} of all that any rank has written down."""
    known = {}
    for path in sorted(cache_dir.glob(f"{glob.escape(stem)}.*.jsonl")):
        with open(path, encoding="utf-8", errors="replace") as lines:
            for line in lines:
                try:
                    number, state, bad = json.loads(line)
                    known[number, state] = {int(position): reason for position, reason in bad.items()}
                except (ValueError, TypeError, AttributeError):
                    continue  # cut short with the process that wrote it
    return known


def keep_json(path: Path, content: dict | list, what: str) -> None:
    """Writes what only saves time next time: all of it or, where that cannot be, nothing but a note."""
    text = json.dumps(content)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}")
        partial.write_text(f"{text}\n{_digest([text])}")
        os.replace(partial, path)
    except OSError as error:
        _cannot_be_kept(what, path.parent, error)


def kept_json(path: Path) -> Any:
    """What `keep_json` wrote; None where it is not there, or damaged."""
    try:
        text, _, digest = path.read_text().partition("\n")
        return json.loads(text) if digest in (_digest([text]), "") else None  # "": of an earlier version
    except (OSError, ValueError):
        return None


def _cannot_be_kept(what: str, folder: Path, error: OSError) -> None:
    print(f"note: {what} cannot be kept in {folder} ({error.strerror})", flush=True)


def tell_unreadable(
    pairs: Pairs, bad: dict[int, str], limit: float = left_out.LIMIT, listing: Path | None = None
) -> None:
    """Says which pictures are left out.

    Raises:
        UsageError: more than `limit` of the pictures are bad, with those samples that reading had left out.
    """
    if bad:
        faults = [*pairs.left_out, *(left_out.Fault(left_out.BROKEN_PICTURE, bad[i]) for i in sorted(bad))]
        left_out.tell(pairs.name, faults, len(pairs.images) + len(pairs.left_out), limit, listing)


def file_stamp(path: str) -> str:
    """Size and modification time, of a URL its version: changes when the file does."""
    if remote.is_remote(path):
        return remote.version(path)
    try:
        info = os.stat(path)
    except OSError:
        return "absent"
    return f"{info.st_size} {info.st_mtime_ns}"
