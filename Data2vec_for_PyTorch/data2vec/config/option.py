"""What an option of a configuration is: acted on, without effect, or accepted with one value alone."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

MISSING = "???"  # has to be given
_KIND_NAMES = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}


@dataclass(frozen=True)
class Key:
    """An option that this project acts on.

    Args:
        default: fairseq's. Its type is the option's; a list's, its first element's.
        low, high: limits, themselves allowed.
        kind: the type where the default, null, does not tell it.
        null: whether null may be given.
        choices: all values there are.
    """

    default: Any
    low: float | None = None
    high: float | None = None
    kind: type | None = None
    null: bool = False
    choices: tuple[Any, ...] = ()

    @property
    def type(self) -> type:
        return self.kind or type(self.default[0] if isinstance(self.default, list) else self.default)

    def checked(self, name: str, value: Any, refuse: Callable[[str], None]) -> Any:
        """The value in the option's type: 1e6 is a whole number, 0 a number, 2024 a folder's name.

        Args:
            refuse: called with what is wrong; raises.
        """
        if value == MISSING or value is None and (self.null or self.default is None):
            return value
        if self.kind is tuple:  # spelled freely, read by its user
            return value
        if isinstance(self.default, list):
            return [self._checked_one(name, v, refuse) for v in (value if isinstance(value, list) else [value])]
        return self._checked_one(name, value, refuse)

    def _checked_one(self, name: str, value: Any, refuse: Callable[[str], None]) -> Any:
        kind = self.type
        wanted = {bool: bool, int: int, float: int | float, str: str | int | float}[kind]
        if kind is int and isinstance(value, float) and value.is_integer():
            value = int(value)
        if not isinstance(value, wanted) or isinstance(value, bool) and kind is not bool:
            refuse(f"{name}={value}: must be {_KIND_NAMES[kind]}")
        if kind in (int, float):
            below, above = self.low is not None and value < self.low, self.high is not None and value > self.high
            if below or above or not math.isfinite(value):
                refuse(f"{name}={value}: must be {self._limits()}")
        value = str(value) if kind is str else float(value) if kind is float else value
        if self.choices and value not in self.choices:
            refuse(f"{name}={value}: choose one of {', '.join(map(str, self.choices))}")
        return value

    def _limits(self) -> str:
        if self.low is None:
            return "a finite number" if self.high is None else f"at most {self.high}"
        return f"at least {self.low}" if self.high is None else f"{self.low} to {self.high}"


@dataclass(frozen=True)
class Ignored:
    """An option without effect here, with any value: its machinery does not exist, or no result depends on it."""

    reason: str


@dataclass(frozen=True)
class Fixed:
    """An option that is accepted with this value alone, fairseq's default: any other would change what is computed."""

    value: Any


Option = Key | Ignored | Fixed


def count(default: int | None, **more: Any) -> Key:
    return Key(default, low=0, kind=int, **more)


def positive(default: int | None, **more: Any) -> Key:
    return Key(default, low=1, kind=int, **more)


def number(default: float | None, low: float = 0, **more: Any) -> Key:
    return Key(default, low=low, kind=float, **more)


def share(default: float) -> Key:
    return Key(default, low=0, high=1, kind=float)
