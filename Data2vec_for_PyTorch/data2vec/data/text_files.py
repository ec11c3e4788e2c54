"""Plain text read in pieces by several processes: cut at line ends, in order, the same lines for any number of them."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

CHUNK_BYTES = 4 << 20


def chunk_ends(path: str | Path, chunk_bytes: int = CHUNK_BYTES) -> list[tuple[int, int]]:
    """(start, stop) byte ranges of about `chunk_bytes`, each ending after a line's newline."""
    size = Path(path).stat().st_size
    ranges = []
    start = 0
    with open(path, "rb") as file:
        while start < size:
            file.seek(min(start + chunk_bytes, size))
            file.readline()
            stop = file.tell()
            ranges.append((start, stop))
            start = stop
    return ranges


def read_lines(path: str | Path, start: int, stop: int) -> list[str]:
    """The lines of a byte range, without their ends; \\r\\n and \\r end lines too, as in Python's text files.

    Raises:
        ValueError: not UTF-8; names the file and the byte.
    """
    with open(path, "rb") as file:
        file.seek(start)
        data = file.read(stop - start)
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 at byte {start + error.start}") from None
    lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    return lines[:-1] if lines[-1] == "" else lines


def map_chunks(
    work: Callable[[str | Path, int, int], Any], path: str | Path, workers: int, chunk_bytes: int = CHUNK_BYTES
) -> Iterator[tuple[Any, int]]:
    """(result, bytes read) of each chunk, in the file's order."""
    ranges = chunk_ends(path, chunk_bytes)
    if workers <= 1 or len(ranges) <= 1:
        for start, stop in ranges:
            yield work(path, start, stop), stop - start
        return
    with multiprocessing.Pool(min(workers, len(ranges))) as pool:
        for (start, stop), result in zip(ranges, pool.imap(partial(_call, work, path), ranges), strict=True):
            yield result, stop - start


def _call(work, path, byte_range):
    return work(path, *byte_range)
