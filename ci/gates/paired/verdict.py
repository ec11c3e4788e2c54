"""From paired timings to a verdict: the ratio of two programs with an interval, and what may be said from it.

A measurement is rounds of pairs. A round is one start of both programs: memory layout and thread placement give every
start a bias of its own, which more pairs of the same two processes do not average out. So the bootstrap draws rounds
first and pairs within them (a two-stage cluster bootstrap; Davison and Hinkley 1997, section 3.8).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

PASS, FAIL, INCONCLUSIVE = "PASS", "FAIL", "INCONCLUSIVE"

Rounds = list[list[float]]  # log(seconds of B / seconds of A) of every pair of every round


@dataclass(frozen=True)
class Interval:
    """How much slower B is than A, in percent: median and confidence interval. Negative: B is faster."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:+.2f} % [{self.low:+.2f}, {self.high:+.2f}]"


def slowdown(rounds: Rounds, confidence: float = 0.99, draws: int = 4000, seed: int = 0) -> Interval:
    """The median slowdown over all pairs and its bootstrap interval.

    Raises:
        ValueError: rounds of different sizes, or one alone, which says nothing about the spread between them.
    """
    if len(rounds) < 2 or len({len(pairs) for pairs in rounds}) != 1 or not rounds[0]:
        sizes = [len(pairs) for pairs in rounds]
        raise ValueError(f"rounds of {sizes} pairs: at least two rounds are needed, with the same number of pairs")
    values = np.array(rounds)  # [R, P]
    generator = np.random.default_rng(seed)
    chosen = generator.integers(len(rounds), size=(draws, len(rounds), 1))  # [D, R, 1]
    pairs = generator.integers(values.shape[1], size=(draws, *values.shape))  # [D, R, P]
    medians = np.median(values[chosen, pairs].reshape(draws, -1), axis=1)  # [D]
    tail = 50 * (1 - confidence)
    low, high = np.percentile(medians, (tail, 100 - tail))
    median = float(np.median(values))
    return Interval(*(100 * math.expm1(value) for value in (median, low, high)))


def verdict(interval: Interval, threshold: float) -> str:
    """One-sided, `threshold` in percent: FAIL when the whole interval is above it, PASS when it is below."""
    if interval.low > threshold:
        return FAIL
    return PASS if interval.high < threshold else INCONCLUSIVE


def why_untrusted(self_check: Interval, threshold: float) -> str | None:
    """Why a host that measured a program against itself with this result cannot judge; None when it can.

    Its interval has to lie within the threshold on both sides and must not exclude zero by much: a third of the
    threshold, since an interval of 99 % around nothing excludes it now and then.
    """
    if self_check.low < -threshold or self_check.high > threshold:
        return f"the base against itself is {self_check}: this host is too noisy for {threshold:g} %"
    if abs(self_check.median) > threshold / 3 and self_check.low * self_check.high > 0:
        return f"the base against itself is {self_check}: this host prefers one of two equal processes"
    return None
