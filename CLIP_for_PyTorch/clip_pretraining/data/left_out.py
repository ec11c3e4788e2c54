"""What is wrong with single samples of a set that is otherwise good: skipped, counted by cause, listed, up to a limit.

A set from the web always has some: captions in other encodings, pictures of unknown kinds, tars that were cut off.
"""

from __future__ import annotations

import csv
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from clip_pretraining.data.texts import Texts
from common import distributed
from common.errors import UsageError

if TYPE_CHECKING:
    from clip_pretraining.data.pairs import Pairs

LIMIT = 0.01  # of samples; above it the data set is wrong, not merely imperfect


class Fault(NamedTuple):
    """Why a sample is left out, and which one."""

    cause: str
    where: str


class Faults(Sequence[Fault]):
    """Many faults, in arrays: 1 % of millions are many."""

    def __init__(self, causes: Texts, places: Texts):
        self.causes, self.places = causes, places

    @classmethod
    def of(cls, faults: Iterable[Fault]) -> Faults:
        if isinstance(faults, cls):
            return faults
        faults = list(faults)
        return cls(*(Texts.of(fault[part] for fault in faults) for part in (0, 1)))

    def __len__(self) -> int:
        return len(self.causes)

    def __getitem__(self, index: int) -> Fault:
        return Fault(self.causes[index], self.places[index])


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
        raise UsageError(
            f"{message}. More than {limit:.3%}: give the right data, or a higher limit with --max_bad_share"
        )
    if distributed.rank() == 0:
        print(f"warning: {message}", flush=True)


def drop_bad_captions(pairs: Pairs, source: str, limit: float = LIMIT, listing: Path | None = None) -> Pairs:
    """Without captions that say nothing or are not UTF-8; tells of them and of what reading had left out already.

    Raises:
        UsageError: more than `limit` of the samples, or all of them.
    """
    causes = {i: cause for i, text in enumerate(pairs.captions) if (cause := _fault_of(text))}
    found = [Fault(cause, pairs.place(int(pairs.image_of_caption[i]))) for i, cause in causes.items()]
    faults = Faults.of([*pairs.left_out, *found])
    tell(source, faults, pairs.samples, limit, listing)
    if len(faults) == pairs.samples:
        raise UsageError(f"{source}: no pairs in it")
    kept = pairs.take(np.setdiff1d(np.arange(len(pairs)), list(causes))) if causes else pairs
    return replace(kept, left_out=faults)


def _fault_of(caption: str) -> str | None:
    if not caption.strip():
        return NO_CAPTION
    try:
        caption.encode()
    except UnicodeEncodeError:  # a surrogate: a byte that was not UTF-8, or half a letter in JSON
        return NOT_UTF8
    return None


def judge(pairs: Pairs, source: str, limit: float = LIMIT, listing: Path | None = None) -> None:
    """Tells what is left out of pairs that an earlier start has read; raises as that would have."""
    tell_of_cut_tars(source, pairs.left_out, len(pairs.images.files), limit, listing)
    tell(source, pairs.left_out, pairs.samples, limit, listing)


def tell_of_cut_tars(
    source: str, faults: Sequence[Fault], tars: int, limit: float = LIMIT, listing: Path | None = None
) -> None:
    """Raises where more than `limit` of the tars are cut short: what they have lost is not known."""
    cut = [fault for fault in faults if fault.cause == CUT_TAR]
    if len(cut) > limit * tars:
        tell(f"{source} ({tars} tars)", cut, tars, limit, listing)


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
