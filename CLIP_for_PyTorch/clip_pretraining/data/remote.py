"""Files behind http(s) URLs: which version it is, the whole of it as a stream, a range of its bytes.

A dropped connection, a timeout or an overloaded server is tried again a few times; "not found" is final at once.
"""

from __future__ import annotations

import contextlib
import functools
import http.client
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from typing import BinaryIO, TypeVar

from common.errors import UsageError

TRIES, FIRST_WAIT_S, TIMEOUT_S = 5, 0.5, 60  # the wait doubles from try to try
_PASSING = (408, 429)  # client errors that go away; those of the server (5xx) may as well
_Result = TypeVar("_Result")


def is_remote(path: str) -> bool:
    return path.startswith(("http://", "https://"))


@functools.cache
def version(url: str) -> str:
    """Size and ETag (or date) of the file: changes when it does.

    Raises:
        UsageError: it cannot be had, or the server sends no ranges of bytes.
    """

    def ask() -> str:
        with _open(url, first=0, last=0) as answer:
            size = answer.headers.get("Content-Range", "").rpartition("/")[2]
            return f"{size} {answer.headers.get('ETag') or answer.headers.get('Last-Modified') or ''}".strip()

    try:
        return with_retries(ask)
    except OSError as error:
        raise UsageError(f"{url}: {error}") from None


def read_range(url: str, offset: int, length: int) -> bytes:
    """Bytes offset .. offset + length - 1.

    Raises:
        OSError: not there, or not after several tries.
    """

    def read() -> bytes:
        with _open(url, offset, offset + length - 1) as answer:
            data = answer.read()
        if len(data) != length:
            raise ConnectionError(f"{len(data)} bytes came of {length}")
        return data

    return with_retries(read)


def read_stream(url: str, reader: Callable[[BinaryIO], _Result]) -> _Result:
    """What `reader` makes of the file, given from its first byte on; all of it anew when the connection breaks off.

    Raises:
        OSError: not there, or not after several tries; and whatever `reader` raises on a file that came whole.
    """

    def read() -> _Result:
        with urllib.request.urlopen(url, timeout=TIMEOUT_S) as answer:
            try:
                return reader(answer)
            finally:
                answer.read()
                if answer.length:  # http.client tells of a broken connection by an early end of the file only
                    raise ConnectionError(f"{answer.length} bytes did not come")

    return with_retries(read)


def with_retries(work: Callable[[], _Result]) -> _Result:
    """What `work` returns, from the first try that the network lets through; its last error, an OSError, otherwise."""
    for attempt in range(TRIES):
        try:
            return work()
        except urllib.error.HTTPError as error:
            if attempt == TRIES - 1 or (error.code < 500 and error.code not in _PASSING):
                raise
        except (OSError, http.client.HTTPException) as error:
            if attempt == TRIES - 1:
                raise error if isinstance(error, OSError) else ConnectionError(repr(error)) from None
        time.sleep(FIRST_WAIT_S * 2**attempt)
    raise AssertionError("unreachable")


@contextlib.contextmanager
def _open(url: str, first: int, last: int) -> Iterator[http.client.HTTPResponse]:
    request = urllib.request.Request(url, headers={"Range": f"bytes={first}-{last}"})
    with urllib.request.urlopen(request, timeout=TIMEOUT_S) as answer:
        if answer.status != http.HTTPStatus.PARTIAL_CONTENT:
            raise UsageError(
                f"{url}: the server sends no ranges of bytes, by which pictures are read out of tars: copy them here"
            )
        yield answer
