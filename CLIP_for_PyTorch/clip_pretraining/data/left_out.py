"""What is wrong with single samples of a set that is otherwise good: skipped, counted by cause, listed, up to a limit.

A set from the web always has some: captions in other encodings, pictures of unknown kinds, tars that were cut off.
"""

from __future__ import annotations

import csv
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from common import distributed
from common.errors import UsageError

LIMIT = 0.01  # of samples; above it the data set is wrong, not merely imperfect


class Fault(NamedTuple):
    """Why a sample is left out, and which one."""

    cause: str
    where: str


NO_CAPTION = "caption empty or missing"
NOT_UTF8 = "caption not UTF-8"
NO_PICTURE = "no picture"
UNKNOWN_PICTURE = "picture of an unknown kind"
BROKEN_PICTURE = "picture cannot be read"
BAD_JSON = "caption's JSON cannot be read"
CUT_TAR = "tar cut short or damaged"


def tell(name: str, faults: Sequence[Fault], total: int, limit: float = LIMIT, listing: Path | None = None) -> None:
    """Says on the main rank what is left out of `total` samples, and writes all of it to `listing`.

    Args:
        name: of the set.
        limit: the largest share that may be left out.
        listing: a table of cause and sample, tab-separated.

    Raises:
        UsageError: more than `limit` of the samples, with the causes.
    """
    if not faults:
        return
    first: dict[str, str] = {}
    for fault in faults:
        first.setdefault(fault.cause, fault.where)
    counts = Counter(fault.cause for fault in faults)
    causes = "; ".join(f"{count} x {cause} (first: {first[cause]})" for cause, count in counts.most_common())
    message = f"{name}: {len(faults)} of {total} samples left out: {causes}"
    if distributed.rank() == 0 and listing is not None:
        message += _write(listing, faults)
    if len(faults) > limit * total:
        raise UsageError(f"{message}. More than {limit:.3%}: is it the right data? --max_bad_share raises the limit")
    if distributed.rank() == 0:
        print(f"warning: {message}", flush=True)


def _write(listing: Path, faults: Sequence[Fault]) -> str:
    """Where the list is, for the message."""
    try:
        listing.parent.mkdir(parents=True, exist_ok=True)
        partial = listing.with_suffix(f".{os.getpid()}")
        with open(partial, "w", encoding="utf-8", errors="backslashreplace", newline="") as file:
            csv.writer(file, delimiter="\t").writerows(faults)
        os.replace(partial, listing)
    except OSError as error:
        return f"; the list cannot be written ({listing}: {error.strerror})"
    return f"; all of them: {listing}"
