"""The configuration: every number has a range, texts have their choices, and a wrong one is one sentence."""

import pytest

from common.errors import UsageError
from vit.config import run_config as config
from vit.config.ranges import RANGES


def numbers() -> list[str]:
    def value(key):
        node = config.Config()
        for part in key.split("."):
            node = getattr(node, part)
        return node

    return [k for k in config.known_keys() if isinstance(value(k), int | float) and not isinstance(value(k), bool)]


def test_every_number_has_a_range_that_its_default_is_in():
    assert set(numbers()) <= set(RANGES)
    config.load(None)


@pytest.mark.parametrize("key", sorted(RANGES))
def test_no_number_may_be_nan_infinite_or_negative(key):
    for text in ("nan", "inf", "-1e9"):
        text = f"[{text},0.5,0.5]" if key in ("data.mean", "data.std") else text
        with pytest.raises(UsageError, match=key):
            config.load(None, [f"{key}={text}"])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optimizer.base_lr=0", "must be a number above 0"),
        ("optimizer.clip_grad=nan", "must be a number of at least 0"),
        ("optimizer.ema_decay=1", "a number from 0 to 1, not 1"),
        ("optimizer.layer_decay=1.5", "a number from 0 to 1, not 0"),
        ("model.drop_path=1", "a number from 0 to 1, not 1"),
        ("data.label_smoothing=2", "a number from 0 to 1, not 1"),
        ("data.min_crop_scale=2", "a number from 0 to 1, not 0"),
        ("model.img_size=0", "a whole number from 1 to 16384"),
        ("data.mean=[0.5,0.5]", "three numbers, one a channel"),
        ("data.mean=[0.5", "not a list such as"),
        ("data.interpolation=lanczos", "bicubic, bilinear, nearest"),
        ("data.auto_augment=bogus", "not a RandAugment of timm's"),
        ("model.name=vit_bas_p16", "did you mean 'vit_base_p16'"),
    ],
)
def test_a_value_outside_is_named_with_what_is_allowed(override, message):
    with pytest.raises(UsageError) as caught:
        config.load(None, [override])
    assert override.split("=")[0] in caught.value.message and message in caught.value.message
