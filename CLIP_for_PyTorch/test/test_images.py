"""Decode, colours and crop against the Pillow pipeline of transformers 5."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from clip_pretraining import load_image
from clip_pretraining.evaluation import normalise_pixels
from clip_pretraining.images import ImageError

GOLDEN = Path(__file__).parent / "golden"
INFO = json.loads((GOLDEN / "preprocess.json").read_text())
EXPECTED = np.load(GOLDEN / "preprocess_expected.npz")
READABLE = [key for key in EXPECTED.files if "|pil" in key]


@pytest.mark.parametrize("key", READABLE)
def test_pixels(key):
    name, kind, size = key.split("|")
    got = load_image(GOLDEN / "images" / name, int(size), exif_transpose=kind == "pil_exif_transposed")
    assert got.dtype == torch.uint8 and got.shape == (3, int(size), int(size)) and got.is_contiguous()
    difference = np.abs(got.permute(1, 2, 0).numpy().astype(int) - EXPECTED[key].astype(int))
    assert difference.max() <= 1
    assert (difference > 0).mean() <= 0.01


def test_every_readable_picture_is_covered():
    good = {name for name, info in INFO["images"].items() if info.get("load_ok")}
    assert good == {key.split("|")[0] for key in READABLE} and len(INFO["images"]) == 18


@pytest.mark.parametrize("name", [n for n, info in INFO["images"].items() if not info.get("load_ok")] + ["absent.jpg"])
def test_an_unreadable_picture_is_named(name):
    with pytest.raises(ImageError, match=name):
        load_image(GOLDEN / "images" / name, 32)


def test_normalised_on_the_device():
    pixels = load_image(GOLDEN / "images" / "rgb_land.jpg", 32)
    mean, std = torch.tensor(INFO["image_mean"]), torch.tensor(INFO["image_std"])
    got = normalise_pixels(pixels[None], mean, std)[0]
    np.testing.assert_allclose(got.numpy(), EXPECTED["rgb_land.jpg|float32|32"], atol=1.1 / 255 / 0.26)
    assert np.abs(got.numpy() - EXPECTED["rgb_land.jpg|float32|32"]).mean() < 1e-3
