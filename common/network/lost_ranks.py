"""Which ranks are gone when a collective fails: asked of the network, at the moment it matters.

Every rank keeps a listening socket open for as long as its group lives. The kernel answers for it, so that it costs no
thread and no traffic. After a failure a rank knocks at all of them: an answer means the process is there, a refusal
that it has ended while its host is up, silence that the host is lost.
"""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

from common.network.hosts import address_towards

PROBE_S = 5.0  # how long a host may take to answer; a route that is down is often silent
ALL_THERE = "all ranks are still there: one of them hangs, or is later than the time-out"
_AT_ONCE = 512  # knocks
_BACKLOG = 4096  # knocks are never taken off the queue
_OF_A_COLLECTIVE = re.compile(
    r"gloo|nccl|hccl|ProcessGroup|connection (closed|reset|refused)|broken pipe|pair closure|wait timeout",
    re.IGNORECASE,
)


class RanksLost(RuntimeError):
    """A collective failed; the message says which ranks and hosts do not answer any more."""

    for_user = True


class Place(NamedTuple):
    """Where a rank can be knocked at."""

    rank: int
    host: str
    address: str
    port: int


@dataclass
class Watch:
    """This rank's listening socket and everybody's place."""

    rank: int
    door: socket.socket | None
    places: Sequence[Place] = ()

    def close(self) -> None:
        if self.door is not None:
            self.door.close()


def open_door(rank: int) -> tuple[Watch, Place | None]:
    """This rank's listening socket, on the address that it has towards MASTER_ADDR, and its place to tell the others.

    (Without an IPv4 route there is no place, and failures are reported as torch words them.)
    """
    address = address_towards(os.environ["MASTER_ADDR"])
    if address is None:
        return Watch(rank, None), None
    door = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    try:
        door.bind((address, 0))
        door.listen(_BACKLOG)
    except OSError:
        door.close()
        return Watch(rank, None), None
    return Watch(rank, door), Place(rank, socket.gethostname(), address, door.getsockname()[1])


def is_of_a_collective(error: BaseException) -> bool:
    """Whether torch raised `error` because other ranks did not take part: DistError, or gloo's plain RuntimeError."""
    return isinstance(error, RuntimeError) and (
        type(error).__name__.startswith("Dist") or bool(_OF_A_COLLECTIVE.search(str(error)))
    )


def is_about_others(text: str) -> bool:
    """Whether an error's text says only that other ranks did not take part, not why."""
    return RanksLost.__name__ in text or "with the other ranks" in text or bool(_OF_A_COLLECTIVE.search(text))


def gone(watch: Watch, probe_s: float = PROBE_S) -> str | None:
    """One line about who is gone; None where nobody is, or places are not known. Takes up to `probe_s` seconds."""
    told = describe(watch, probe_s)
    return None if told == ALL_THERE else told


def describe(watch: Watch, probe_s: float = PROBE_S) -> str | None:
    """One line about who is gone, or None where places are not known. Takes up to `probe_s` seconds."""
    others = [place for place in watch.places if place.rank != watch.rank]
    if not others:
        return None
    answers = knock(others, probe_s)
    silent = [place for place in others if answers[place] == "silent"]
    ended = [place for place in others if answers[place] == "refused"]
    here = next(place.address for place in watch.places if place.rank == watch.rank)
    lines = []
    elsewhere = _hosts(others) - {here}
    if len(elsewhere) > 1 and _hosts(silent) == elsewhere:
        lines.append(f"no other host answers {here}: this host itself may be cut off")
    elif silent:
        lines.append(f"no answer from {_listed(silent)}: the host is lost, or cut off from {here}")
    if ended:
        lines.append(f"ended: {_listed(ended)}; the reason is in the log of the rank that ended first")
    return "; ".join(lines) or ALL_THERE


def knock(places: Sequence[Place], probe_s: float) -> dict[Place, str]:
    """For each place whether its process is there ("answer"), has ended ("refused"), or its host is "silent"."""

    def ask(place: Place) -> str:
        try:
            socket.create_connection((place.address, place.port), probe_s).close()
        except ConnectionRefusedError:
            return "refused"
        except OSError:  # nothing comes back, or there is no route
            return "silent"
        return "answer"

    with ThreadPoolExecutor(min(len(places), _AT_ONCE)) as threads:
        return dict(zip(places, threads.map(ask, places), strict=True))


def _hosts(places: Sequence[Place]) -> set[str]:
    return {place.address for place in places}


def _listed(places: Sequence[Place], limit: int = 8) -> str:
    """ "rank 2 on 10.0.0.3 (node3), ranks 4, 5 on ..." """
    by_host: dict[tuple[str, str], list[int]] = {}
    for place in places:
        by_host.setdefault((place.address, place.host), []).append(place.rank)
    texts = []
    for (address, host), ranks in list(by_host.items())[:limit]:
        numbers = ", ".join(map(str, ranks[:limit])) + (" ..." if len(ranks) > limit else "")
        texts.append(f"rank{'s' if len(ranks) > 1 else ''} {numbers} on {address} ({host})")
    return ", ".join(texts) + (f" and {len(by_host) - limit} more hosts" if len(by_host) > limit else "")
