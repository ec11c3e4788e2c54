"""Ranges of numeric options, nan and inf refused: the `type=` of an argparse option, and a check for YAML values.

parser.add_argument("--clip_grad", type=not_negative, ...)      # argparse's own error names option and value
fraction.require("model.drop_path", config.model.drop_path)     # UsageError naming both
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from common.errors import UsageError


@dataclass(frozen=True)
class Range:
    """Numbers from `low` to `high`, without those that `without` names; `whole` ones only."""

    low: float = -math.inf
    high: float = math.inf
    without: tuple[float, ...] = ()
    whole: bool = False

    def __call__(self, text: str) -> int | float:
        """The number in a command line's text; ValueError, with the range in its message, where it is outside."""
        from argparse import ArgumentTypeError

        try:
            value = int(text) if self.whole else float(text)
        except ValueError:
            value = math.nan
        if not self.holds(value):
            raise ArgumentTypeError(f"{text!r}: must be {self}")
        return value

    def holds(self, value: Any) -> bool:
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            return False
        is_kind = not self.whole or value == int(value)
        return is_kind and self.low <= value <= self.high and value not in self.without

    def require(self, name: str, value: Any) -> None:
        """UsageError naming option and value where it is outside."""
        if not self.holds(value):
            raise UsageError(f"{name}={value}: must be {self}")

    def __str__(self) -> str:
        what = "a whole number" if self.whole else "a number"
        above, below = self.low in self.without, self.high in self.without
        if math.isinf(self.low) and math.isinf(self.high):
            return f"{what} (not nan or inf)"
        if math.isinf(self.high):
            return f"{what} {'above' if above else 'of at least'} {self.low:g}"
        ends = {(False, False): "", (True, False): f", not {self.low:g}", (False, True): f", not {self.high:g}"}
        return f"{what} from {self.low:g} to {self.high:g}{ends.get((above, below), ', neither of them')}"


finite = Range()
positive = Range(0, without=(0,))  # learning rates, epsilons, temperatures
not_negative = Range(0)  # weight decay, clipping (0: none), warm-up
fraction = Range(0, 1)  # probabilities, smoothing
below_one = Range(0, 1, without=(1,))  # drop path, momentum, betas, decay of an average
share = Range(0, 1, without=(0,))  # crop scales, layer decay
count = Range(0, whole=True)  # 0 included: workers, intervals (0: never)
at_least_one = Range(1, whole=True)  # sizes, batches, epochs
