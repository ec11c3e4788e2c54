"""Pairs from tables: CSV, TSV and others with a delimiter, JSON, JSON lines."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from clip_pretraining.data import left_out, remote
from clip_pretraining.data.left_out import drop_bad_captions
from clip_pretraining.data.pairs import Pairs, Pictures
from clip_pretraining.data.texts import GrowingTexts, first_equal
from common.errors import UsageError


def read_table(
    path: str | Path,
    image_column: str,
    caption_column: str,
    image_root: str | Path | None = None,
    delimiter: str | None = None,
    limit: float = left_out.LIMIT,
    listing: Path | None = None,
) -> Pairs:
    """Pairs of a table with a header (.csv, .tsv, .txt), or of a .json or .jsonl file; of several, joined by `::`.

    Captions are text, always: the words "None", "NA" and "null" stay words. Pictures are looked up in `image_root`,
    default the table's folder. Captions that say nothing or are not UTF-8 are left out, up to `limit` of them.

    Args:
        delimiter: between columns; default a comma, in .tsv and .txt a tab.
        limit, listing: see left_out.py.

    Raises:
        UsageError: no such file or column, or a row that is cut short; the message names file and line.
    """
    tables = [Path(part) for part in str(path).split("::")]
    root = str(image_root) if image_root else os.path.commonpath([table.parent for table in tables])
    images, captions, starts = GrowingTexts(), GrowingTexts(), []
    for table in tables:
        starts.append(len(captions))
        within = "" if image_root else os.path.relpath(table.parent, root)
        for image, caption in _rows(table, image_column, caption_column, delimiter):
            images.append(image if within in ("", ".") else os.path.join(within, image))
            captions.append(caption)
        if len(captions) == starts[-1]:
            raise UsageError(f"{table}: no rows")
    images = images.packed()
    distinct, owner = np.unique(first_equal(images, len(images)), return_inverse=True)  # as they first appear
    names = images.take(distinct)
    pairs = Pairs(
        tables[0].stem, Pictures(names, root), captions.packed(), owner, names, starts=np.array(starts, dtype=np.int64)
    )
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
        raise UsageError(f"{place}: must be an object of columns, not {str(record)[:40]!r}")
    for column in (image_column, caption_column):
        if column not in record:
            columns = ", ".join(str(c) for c in record)
            raise UsageError(f"{place}: no column {column!r} (there are: {columns})")
    image, caption = record[image_column], record[caption_column]
    if not isinstance(image, str) or not image or "\0" in image:
        raise UsageError(f"{place}: column {image_column!r} holds no file name but {image!r}")
    if remote.is_remote(image):
        raise UsageError(f"{place}: {image}: a table's pictures must be files here; only tars are read from URLs")
    if caption is not None and not isinstance(caption, str):
        raise UsageError(f"{place}: the caption must be text, not {caption!r}")
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
