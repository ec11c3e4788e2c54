"""Shears and translations give timm's picture, to a grey level, and leave to it what they cannot do."""

import numpy as np
import pytest
from PIL import Image
from timm.data import auto_augment

from common.data.shears import SMALLEST, use_fast_shears

OPTIONS = {"resample": Image.Resampling.BICUBIC, "fillcolor": (124, 116, 104)}
TIMMS = {
    "ShearX": auto_augment.shear_x,
    "ShearY": auto_augment.shear_y,
    "TranslateXRel": auto_augment.translate_x_rel,
    "TranslateYRel": auto_augment.translate_y_rel,
}


def picture(width, height, mode="RGB"):
    noise = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(noise).convert(mode)


@pytest.fixture(autouse=True)
def fast(monkeypatch):
    monkeypatch.setattr(auto_augment, "NAME_TO_OP", dict(auto_augment.NAME_TO_OP))
    use_fast_shears()


@pytest.mark.parametrize("name", TIMMS)
def test_the_picture_is_timm_s_to_a_grey_level(name):
    image, fast_one = picture(150, 131), auto_augment.NAME_TO_OP[name]
    for amount in (-0.45, -0.27, 0.0, 0.123, 0.3, 1.2):
        theirs = np.asarray(TIMMS[name](image, amount, **OPTIONS)).astype(int)
        ours = np.asarray(fast_one(image, amount, **OPTIONS)).astype(int)
        assert abs(ours - theirs).max() <= 1 and (ours != theirs).mean() < 0.004, amount


@pytest.mark.parametrize("name", TIMMS)
def test_other_pictures_and_settings_are_timm_s_own(name):
    for image, options in (
        (picture(SMALLEST - 1, 200), OPTIONS),
        (picture(150, 150, "L"), OPTIONS | {"fillcolor": 124}),
        (picture(150, 150), OPTIONS | {"resample": Image.Resampling.BILINEAR}),
    ):
        ours, theirs = (shear(image, 0.2, **options) for shear in (auto_augment.NAME_TO_OP[name], TIMMS[name]))
        assert ours.mode == theirs.mode and np.array_equal(np.asarray(ours), np.asarray(theirs))
