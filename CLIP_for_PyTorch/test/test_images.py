"""Decode, colours and crop against the Pillow pipeline of transformers 5."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from clip_pretraining import load_image
from clip_pretraining.data.images import ImageError, resize_and_crop
from clip_pretraining.data.pairs import DecodedImages, ImageRef
from clip_pretraining.data.random_crop import RandomCrops, random_box
from clip_pretraining.evaluation.encoder import normalise_pixels
from common.device import mix_seed

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


@pytest.mark.parametrize(
    "width, height, size",
    [(213, 451, 64), (262, 541, 224), (200, 400, 48), (20, 19, 224), (58, 17, 224), (451, 213, 64)],
)
def test_jpegs_of_unusual_shape_have_pillows_pixels(width, height, size, tmp_path):
    """Over twice as high as wide Pillow begins with the rows; growing, a box moves more than a level."""
    noise = np.random.default_rng(0).integers(0, 256, (height // 8 + 1, width // 8 + 1, 3), dtype=np.uint8)
    Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC).save(tmp_path / "a.jpg")
    with Image.open(tmp_path / "a.jpg") as image:
        want = np.asarray(resize_and_crop(image, size)).astype(int)
    difference = np.abs(load_image(tmp_path / "a.jpg", size).permute(1, 2, 0).numpy() - want)
    assert difference.max() <= 1 and (difference > 0).mean() <= 0.01


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


def test_random_crops_are_parts_by_torchvision_s_rule(tmp_path):
    """Sizes, proportions and places over many draws; each is what torchvision's crop and resize makes of it."""
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms.functional import pil_to_tensor, resized_crop

    path = GOLDEN / "images" / "rgb_land.jpg"
    image = Image.open(path)
    crops = RandomCrops(DecodedImages([ImageRef(str(path))], 32), 0.5, seed=3)
    shares, lefts = [], set()
    for epoch in range(200):
        crops.set_epoch(epoch)
        box = random_box(*image.size, 0.5, np.random.default_rng(mix_seed(3, epoch, 0)))
        left, upper, right, lower = box
        assert 0 <= left < right <= image.width and 0 <= upper < lower <= image.height
        assert 0.74 < (right - left) / (lower - upper) < 1.35
        shares.append((right - left) * (lower - upper) / image.width / image.height)
        lefts.add(left)
        if epoch < 3:
            theirs = resized_crop(image, upper, left, lower - upper, right - left, [32, 32], InterpolationMode.BICUBIC)
            assert torch.equal(crops[0], pil_to_tensor(theirs)) and torch.equal(crops[0], crops[0])
    assert 0.49 < min(shares) < 0.55 and 0.9 < max(shares) and len(lefts) > 20
    assert random_box(400, 10, 0.9, np.random.default_rng(0)) == (193, 0, 206, 10)  # none fits: the centre
