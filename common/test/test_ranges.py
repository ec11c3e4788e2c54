"""Ranges of numeric options: nan and inf are in none of them, and messages name option, value and range."""

import argparse
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.command_line import ranges
from common.errors import UsageError

RANGES = {name: value for name, value in vars(ranges).items() if isinstance(value, ranges.Range)}


@pytest.mark.parametrize(
    ("name", "inside", "outside"),
    [
        ("finite", "-3 0 1e9", "x 1,5"),
        ("positive", "1e-9 2", "0 -1"),
        ("not_negative", "0 7.5", "-1e-9"),
        ("fraction", "0 0.5 1", "1.1 -0.1"),
        ("below_one", "0 0.999", "1 -0.1"),
        ("share", "1e-3 1", "0 1.01"),
        ("count", "0 12", "-1 1.5 1e3"),
        ("at_least_one", "1 12", "0 0.5"),
    ],
)
def test_ranges_of_a_command_line(name, inside, outside, capsys):
    parser = argparse.ArgumentParser()
    parser.add_argument("--value", type=RANGES[name])
    for text in inside.split():
        assert parser.parse_args([f"--value={text}"]).value == float(text)
    for text in [*outside.split(), "nan", "inf", "-inf", ""]:
        with pytest.raises(SystemExit):
            parser.parse_args([f"--value={text}"])
        assert f"--value: {text!r}: must be {RANGES[name]}" in capsys.readouterr().err


@given(st.sampled_from(sorted(RANGES)), st.floats())
def test_what_a_range_holds_is_finite_and_inside(name, value):
    kind = RANGES[name]
    if kind.holds(value):
        assert math.isfinite(value) and kind.low <= value <= kind.high and value not in kind.without
        kind.require("optimizer.lr", value)
    else:
        with pytest.raises(UsageError, match="optimizer.lr=.*: must be a"):
            kind.require("optimizer.lr", value)
