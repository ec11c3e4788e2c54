"""apex's options in torch's words."""

import pytest

from common.command_line.apex_options import translate
from common.errors import UsageError


@pytest.mark.parametrize(
    ("level", "precision", "expected"),
    [(None, None, None), (None, "bf16", "bf16"), ("O0", None, "fp32"), ("O1", None, "fp16"), ("O2", "fp16", "fp16")],
)
def test_levels_are_precisions(level, precision, expected):
    assert translate(level, precision).precision == expected
    assert bool(translate(level, precision).notes) == (level is not None)


def test_what_means_nothing_is_said_and_what_contradicts_is_refused():
    assert "DDP's buckets" in translate(None, None, combine_grad=True).notes[0]
    assert "parameters stay fp32" in translate("O2", None).notes[0]
    with pytest.raises(UsageError, match="O0, O1, O2 or O3"):
        translate("O4", None)
    with pytest.raises(UsageError, match="O2 is fp16, --precision is bf16"):
        translate("O2", "bf16")
