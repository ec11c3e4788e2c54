"""Pairs from tables (CSV, TSV, JSON lines); what to do about bad rows and pictures, of any source."""

from __future__ import annotations

import csv
import functools
import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

from clip_pretraining.data import left_out, remote
from clip_pretraining.data.pairs import ImageRef, Pairs, relative_to, unreadable_images
from common import distributed
from common.errors import UsageError

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp", "bmp")


def read_table(
    path: str | Path,
    image_column: str,
    caption_column: str,
    image_root: str | Path | None = None,
    delimiter: str | None = None,
    limit: float = left_out.LIMIT,
    listing: Path | None = None,
) -> Pairs:
    """Pairs of a table with a header (.csv, .tsv, .txt), or of a .json or .jsonl file.

    Captions are text, always: the words "None", "NA" and "null" stay words. Pictures are looked up in `image_root`,
    default the table's folder. Captions that say nothing or are not UTF-8 are left out, up to `limit` of them.

    Args:
        delimiter: between columns; default a comma, in .tsv and .txt a tab.
        limit, listing: see left_out.py.

    Raises:
        UsageError: no such file or column, or a row that is cut short; the message names file and line.
    """
    path = Path(path)
    folder = Path(image_root) if image_root else path.parent
    rows = list(_rows(path, image_column, caption_column, delimiter))
    if not rows:
        raise UsageError(f"{path}: no rows")
    names: dict[str, int] = {}
    owner = [names.setdefault(image, len(names)) for image, _ in rows]
    refs = [ImageRef(relative_to(folder, name)) for name in names]
    pairs = Pairs(path.stem, refs, [caption for _, caption in rows], owner, list(names))
    return drop_bad_captions(pairs, str(path), limit, listing)


def _rows(path: Path, image_column: str, caption_column: str, delimiter: str | None) -> Iterator[tuple[str, str]]:
    suffix = path.suffix.lower()
    if suffix not in (".csv", ".tsv", ".txt", ".json", ".jsonl"):
        raise UsageError(f"{path}: give a .csv, .tsv, .txt, .json or .jsonl file")
    try:
        # a byte that is not UTF-8 becomes a surrogate, by which the caption is known later
        with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            if suffix in (".json", ".jsonl"):
                records = _json_records(file, path)
            else:
                records = _table_records(file, delimiter or ("," if suffix == ".csv" else "\t"))
            for line, record in records:
                yield _checked(record, f"{path}:{line}", image_column, caption_column)
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise UsageError(f"{path}: not readable as UTF-8 text in {suffix} form ({error})") from None


def _checked(record: object, place: str, image_column: str, caption_column: str) -> tuple[str, str]:
    """Picture and caption of one row."""
    if not isinstance(record, dict):
        raise UsageError(f"{place}: not an object of columns but {str(record)[:40]!r}")
    for column in (image_column, caption_column):
        if column not in record:
            columns = ", ".join(str(c) for c in record)
            raise UsageError(f"{place}: no column {column!r} (there are: {columns})")
    image, caption = record[image_column], record[caption_column]
    if not isinstance(image, str) or not image or "\0" in image:
        raise UsageError(f"{place}: column {image_column!r} holds no file name but {image!r}")
    if caption is not None and not isinstance(caption, str):
        raise UsageError(f"{place}: the caption is not text but {caption!r}")
    return image, caption or ""


def _table_records(file: Iterable[str], delimiter: str) -> Iterator[tuple[int, dict]]:
    reader = csv.DictReader(file, delimiter=delimiter)
    for record in reader:
        yield reader.line_num, record


def _json_records(file, path: Path) -> Iterator[tuple[int, dict]]:
    try:
        if path.suffix.lower() == ".json":
            content = json.load(file)
            records = content.get("data") if isinstance(content, dict) else content
            if not isinstance(records, list):
                raise UsageError(f'{path}: neither a list of rows nor {{"data": [rows]}}')
            yield from enumerate(records, 1)
            return
        for number, line in enumerate(file, 1):
            if line.strip():
                yield number, json.loads(line)
    except (ValueError, RecursionError) as error:  # also a number of thousands of digits, and brackets without end
        raise UsageError(f"{path}: not valid JSON: {error}") from None


def drop_bad_captions(pairs: Pairs, source: str, limit: float = left_out.LIMIT, listing: Path | None = None) -> Pairs:
    """Without captions that say nothing or are not UTF-8; tells of them and of what reading had left out already.

    Raises:
        UsageError: more than `limit` of the samples, or all of them.
    """
    total = len(pairs) + len(pairs.left_out)
    causes = {i: cause for i, text in enumerate(pairs.captions) if (cause := _fault_of(text))}
    found = [left_out.Fault(cause, pairs.image_keys[pairs.image_of_caption[i]]) for i, cause in causes.items()]
    faults = [*pairs.left_out, *found]
    left_out.tell(source, faults, total, limit, listing)
    if len(faults) == total:
        raise UsageError(f"{source}: no pairs in it")
    kept = pairs.take(np.setdiff1d(np.arange(len(pairs)), list(causes))) if causes else pairs
    return replace(kept, left_out=faults)


def _fault_of(caption: str) -> str | None:
    if not caption.strip():
        return left_out.NO_CAPTION
    try:
        caption.encode()
    except UnicodeEncodeError:  # a surrogate: a byte that was not UTF-8, or half a letter in JSON
        return left_out.NOT_UTF8
    return None


def check_images(pairs: Pairs, workers: int, cache_dir: Path) -> dict[int, str]:
    """{position: reason} of the pictures that cannot be read. Each is decoded once, however many captions it has.

    Every rank looks at its share, and all learn everything. The verdict is kept in `cache_dir` for as long as no file
    changes.
    """
    verdict = None
    if distributed.rank() == 0:
        digest = hashlib.blake2b(digest_size=12)
        for ref in pairs.images:
            digest.update(f"{ref.name} {file_stamp(ref.path)}\n".encode("utf-8", "surrogateescape"))
        verdict = cache_dir / f"unreadable_{pairs.name}_{digest.hexdigest()}.json"
    known = json.loads(verdict.read_text()) if verdict is not None and verdict.is_file() else None
    known = distributed.broadcast_object(known)
    if known is not None:
        return {int(position): reason for position, reason in known.items()}
    say = functools.partial(print, flush=True) if distributed.rank() == 0 else lambda text: None
    shares = unreadable_images(pairs.images, workers, distributed.rank(), distributed.world_size(), say)
    bad = {i: reason for share in distributed.gather_objects(shares) for i, reason in share.items()}
    if verdict is not None:
        keep_json(verdict, bad, "the check of the pictures")
    return bad


def keep_json(path: Path, content: dict | list, what: str) -> None:
    """Writes what only saves time next time: all of it or, where that cannot be, nothing but a note."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}")
        partial.write_text(json.dumps(content))
        os.replace(partial, path)
    except OSError as error:
        print(f"note: {what} cannot be kept in {path.parent} ({error.strerror})", flush=True)


def drop_unreadable(
    pairs: Pairs, bad: dict[int, str], limit: float = left_out.LIMIT, listing: Path | None = None
) -> Pairs:
    """Without the pictures `check_images` named, and without their captions.

    Raises:
        UsageError: more than `limit` of the pictures are bad, with those samples that reading had left out.
    """
    if not bad:
        return pairs
    faults = [*pairs.left_out, *(left_out.Fault(left_out.BROKEN_PICTURE, bad[i]) for i in sorted(bad))]
    left_out.tell(pairs.name, faults, len(pairs.images) + len(pairs.left_out), limit, listing)
    return pairs.without_images(sorted(bad))


def file_stamp(path: str) -> str:
    """Size and modification time, of a URL its version: changes when the file does."""
    if remote.is_remote(path):
        return remote.version(path)
    try:
        info = os.stat(path)
    except OSError:
        return "absent"
    return f"{info.st_size} {info.st_mtime_ns}"
