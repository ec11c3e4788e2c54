"""Pairs from tables (CSV, TSV, JSON lines); what to do about bad rows and pictures, of any source."""

from __future__ import annotations

import csv
import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from clip_pretraining.data import remote
from clip_pretraining.data.pairs import ImageRef, Pairs, relative_to, unreadable_images
from common import distributed
from common.errors import UsageError

MAX_BAD_SHARE = 0.01  # of pictures or captions; above it the data set is wrong, not merely imperfect
IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp", "bmp")


def read_table(path: str | Path, image_column: str, caption_column: str, image_root: str | Path | None = None) -> Pairs:
    """Pairs of a .csv, .tsv, .json or .jsonl file.

    Captions are text, always: the words "None", "NA" and "null" stay words. Pictures are looked up in `image_root`,
    default the table's folder.

    Raises:
        UsageError: no such file or column, or a row that is cut short; the message names file and line.
    """
    path = Path(path)
    folder = Path(image_root) if image_root else path.parent
    rows = list(_rows(path, image_column, caption_column))
    if not rows:
        raise UsageError(f"{path}: no rows")
    names: dict[str, int] = {}
    owner = [names.setdefault(image, len(names)) for image, _ in rows]
    refs = [ImageRef(relative_to(folder, name)) for name in names]
    return drop_empty_captions(Pairs(path.stem, refs, [caption for _, caption in rows], owner, list(names)), str(path))


def _rows(path: Path, image_column: str, caption_column: str) -> Iterator[tuple[str, str]]:
    suffix = path.suffix.lower()
    if suffix not in (".csv", ".tsv", ".json", ".jsonl"):
        raise UsageError(f"{path}: give a .csv, .tsv, .json or .jsonl file")
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            if suffix in (".csv", ".tsv"):
                records = _table_records(file, "\t" if suffix == ".tsv" else ",")
            else:
                records = _json_records(file, path)
            for line, record in records:
                if not isinstance(record, dict):
                    raise UsageError(f"{path}:{line}: not an object of columns but {str(record)[:40]!r}")
                for column in (image_column, caption_column):
                    if column not in record:
                        columns = ", ".join(str(c) for c in record)
                        raise UsageError(f"{path}:{line}: no column {column!r} (there are: {columns})")
                image, caption = record[image_column], record[caption_column]
                if not isinstance(image, str) or not image:
                    raise UsageError(f"{path}:{line}: column {image_column!r} holds no file name but {image!r}")
                if caption is not None and not isinstance(caption, str):
                    raise UsageError(f"{path}:{line}: the caption is not text but {caption!r}")
                yield image, caption or ""
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise UsageError(f"{path}: not readable as UTF-8 text in {suffix} form ({error})") from None


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
    except json.JSONDecodeError as error:
        raise UsageError(f"{path}: not valid JSON: {error}") from None


def drop_empty_captions(pairs: Pairs, source: str) -> Pairs:
    """Without captions that say nothing; `source` is for the message.

    Raises:
        UsageError: more than 1 % of the captions are empty.
    """
    empty = [i for i, caption in enumerate(pairs.captions) if not caption.strip()]
    if not empty:
        return pairs
    first = pairs.image_keys[pairs.image_of_caption[empty[0]]]
    message = f"{source}: {len(empty)} captions of {len(pairs)} are empty or missing (first: {first})"
    _tolerate(len(empty), len(pairs), message)
    return pairs.take(np.setdiff1d(np.arange(len(pairs)), empty))


def check_images(pairs: Pairs, workers: int, cache_dir: Path) -> dict[int, str]:
    """{position: reason} of the pictures that cannot be read. Each is decoded once, however many captions it has.

    The verdict is kept in `cache_dir` for as long as no file changes.
    """
    digest = hashlib.blake2b(digest_size=12)
    for ref in pairs.images:
        digest.update(f"{ref.name} {file_stamp(ref.path)}\n".encode())
    verdict = cache_dir / f"unreadable_{pairs.name}_{digest.hexdigest()}.json"
    if verdict.is_file():
        return {int(position): reason for position, reason in json.loads(verdict.read_text()).items()}
    bad = unreadable_images(pairs.images, workers)
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


def drop_unreadable(pairs: Pairs, bad: dict[int, str]) -> Pairs:
    """Without the pictures `check_images` named, and without their captions.

    Raises:
        UsageError: more than 1 % of the pictures are bad.
    """
    if bad:
        listed = "; ".join(list(bad.values())[:3])
        message = f"{pairs.name}: {len(bad)} pictures of {len(pairs.images)} cannot be read ({listed})"
        _tolerate(len(bad), len(pairs.images), message)
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


def _tolerate(bad: int, total: int, message: str) -> None:
    """Reports and goes on below the limit, stops above it."""
    if bad > MAX_BAD_SHARE * total:
        raise UsageError(f"{message}: above {MAX_BAD_SHARE:.0%}, so the data set itself is wrong")
    if distributed.rank() == 0:
        print(f"warning: {message}: skipped", flush=True)
