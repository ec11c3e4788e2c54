"""Tables of sentences: .csv, .tsv (GLUE's, without quotes) or .jsonl, with named columns."""

from __future__ import annotations

import csv
import difflib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from common.errors import UsageError

SUFFIXES = (".csv", ".tsv", ".jsonl")


@dataclass(frozen=True)
class Row:
    """One example; `line` is where it ends in its file, for messages."""

    line: int
    texts: tuple[str, ...]
    label: str | None


def find_table(folder: Path, name: str) -> Path:
    """The split's file. UsageError where there is none, or more than one."""
    found = [path for suffix in SUFFIXES if (path := folder / f"{name}{suffix}").is_file()]
    if len(found) != 1:
        have = f"there are {', '.join(path.name for path in found)}: keep one" if found else "it does not exist"
        raise UsageError(f"{folder}: the table {name}.csv, {name}.tsv or {name}.jsonl is needed, and {have}")
    return found[0]


def read_table(path: Path, columns: Sequence[str], label: str | None) -> list[Row]:
    """All rows.

    Args:
        columns: of the texts.
        label: that of the label; None where none is wanted.

    Raises:
        UsageError: one sentence with file and line: not UTF-8, no such column, a row of another length, an empty cell,
            no rows.
    """
    wanted = [*columns, *([label] if label else [])]
    rows = []
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            for line, record in _reader(path)(file, path):
                cells = [_cell(record, name, f"{path}, line {line}") for name in wanted]
                rows.append(Row(line, tuple(cells[: len(columns)]), cells[-1] if label else None))
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: not UTF-8 ({error.reason} at byte {error.start})") from None
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}") from None
    if not rows:
        raise UsageError(f"{path}: no rows")
    return rows


def has_column(path: Path, name: str) -> bool:
    """Whether the first row has it. UsageError as of `read_table`."""
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            return name in next(_reader(path)(file, path), (0, {}))[1]
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: not UTF-8 ({error.reason} at byte {error.start})") from None


def _reader(path: Path) -> Callable[[TextIO, Path], Iterator[tuple[int, Mapping[str, Any]]]]:
    if path.suffix not in SUFFIXES:
        raise UsageError(f"{path}: not a table; give one of {', '.join(SUFFIXES)}")
    return _json_records if path.suffix == ".jsonl" else _records


def _records(file: TextIO, path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    tabs = path.suffix == ".tsv"
    reader = csv.reader(
        file, delimiter="\t" if tabs else ",", quoting=csv.QUOTE_NONE if tabs else csv.QUOTE_MINIMAL, strict=True
    )
    names: list[str] | None = None
    try:
        for cells in reader:
            if names is None:
                names = cells
                if twice := sorted({name for name in names if names.count(name) > 1}):
                    raise UsageError(f"{path}: column {twice[0]!r} is named twice: rename one")
            elif len(cells) == len(names):
                yield reader.line_num, dict(zip(names, cells, strict=True))
            elif cells:  # else an empty line
                where = f"{path}, line {reader.line_num}"
                raise UsageError(
                    f"{where}: {len(cells)} cells, but the first line names {len(names)} columns: write as many"
                )
    except csv.Error as error:
        raise UsageError(f"{path}, line {reader.line_num}: {error}") from None


def _json_records(file: TextIO, path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    for line, text in enumerate(file, 1):
        if not text.strip():
            continue
        try:
            record = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise UsageError(f"{path}, line {line}: not JSON ({error})") from None
        if not isinstance(record, dict):
            raise UsageError(f"{path}, line {line}: must be an object with the columns as its names")
        yield line, record


def _cell(record: Mapping[str, Any], name: str, where: str) -> str:
    if name not in record:
        near = difflib.get_close_matches(name, record, 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise UsageError(f"{where}: no column {name!r}, there are {', '.join(map(repr, record))}{hint}")
    value = record[name]
    if not isinstance(value, str | int | float):
        raise UsageError(f"{where}: column {name!r} holds {value!r}, must be a text or a number")
    if not (text := str(value).strip()):
        raise UsageError(f"{where}: column {name!r} is empty")
    if any("\ud800" <= letter <= "\udfff" for letter in text):
        raise UsageError(
            f"{where}: column {name!r} holds half a character (a lone surrogate), correct it: {text[:40]!r}"
        )
    return text
