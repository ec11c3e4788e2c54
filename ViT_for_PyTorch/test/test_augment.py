"""Augmentation and evaluation crops: timm's and torchvision's mathematics, and draws that depend on the seed alone."""

import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data.auto_augment import rand_augment_transform
from timm.data.random_erasing import RandomErasing
from timm.data.transforms import RandomResizedCropAndInterpolation
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as tv

from vit.data.augment import (
    CROP_RATIO,
    MEAN,
    STD,
    Augmentation,
    Erasure,
    EvalTransform,
    TrainTransform,
    erase,
    normalise,
    rand_augment,
    random_crop,
    random_erasing_box,
    resize,
)

PLAIN = Augmentation(horizontal_flip=0.0, auto_augment="", random_erasing=0.0)


def smooth_picture(width, height, seed=0):
    """A picture with structure and some noise, uint8 [H, W, 3]."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (9, 12, 3), dtype=np.uint8)).resize((width, height), Image.BICUBIC)
    noise = rng.integers(-20, 20, (height, width, 3))
    return (np.asarray(coarse).astype(int) + noise).clip(0, 255).astype(np.uint8)


@pytest.mark.parametrize("width, height", [(500, 375), (375, 500), (30, 400), (1000, 20), (1, 1)])
def test_random_crop_draws_timms_boxes(width, height):
    image = Image.new("RGB", (width, height))
    for seed in range(200):
        random.seed(seed)
        expected = RandomResizedCropAndInterpolation.get_params(image, (0.08, 1.0), CROP_RATIO)
        random.seed(seed)
        box = random_crop(height, width, (0.08, 1.0), CROP_RATIO)
        # where timm would crop nothing of a picture one pixel wide, we keep a pixel
        assert box == expected or 0 in expected


@pytest.mark.parametrize("crop", [(10, 20, 300, 400), (5, 7, 60, 50), (0, 0, 375, 500)])
def test_resize_is_pils_up_to_rounding(crop):
    top, left, height, width = crop
    pixels = smooth_picture(500, 375)
    part = pixels[top : top + height, left : left + width]
    expected = np.asarray(Image.fromarray(part).resize((224, 224), Image.BICUBIC)).astype(int)
    difference = np.abs(resize(part, 224) - expected)
    assert difference.max() <= 2 and (difference > 0).mean() < 0.01 and (difference > 1).mean() < 1e-4


def test_train_crops_are_timms():
    """The same draws give the same crop; only the resize rounds differently."""
    pixels = smooth_picture(160, 120)
    ours = TrainTransform(64, PLAIN)
    theirs = RandomResizedCropAndInterpolation(64, (0.08, 1.0), CROP_RATIO, "bicubic")
    for seed in range(20):
        result, box = ours(pixels, seed)
        random.seed(seed)
        expected = np.asarray(theirs(Image.fromarray(pixels))).astype(int)
        assert box is None and np.abs(result - expected).max() <= 2


def test_rand_augment_is_timms_but_for_posterizing_to_nothing():
    settings = {"translate_const": 28, "img_mean": (124, 116, 104), "interpolation": Image.BICUBIC}
    image = Image.fromarray(smooth_picture(64, 64))

    def augmented(transform, seed):
        random.seed(seed)
        np.random.seed(seed)
        return np.asarray(transform(image))

    text = "rand-m9-mstd0.5-inc1"
    ours, theirs = rand_augment(text, settings), rand_augment_transform(text, settings)
    compared = 0
    for seed in range(60):
        result = augmented(ours, seed)
        try:
            expected = augmented(theirs, seed)
        except ValueError:  # timm asked Pillow for 0 bits
            continue
        np.testing.assert_array_equal(result, expected)
        compared += 1
    assert compared > 50
    strongest = rand_augment("rand-m10-n4-inc1", settings)  # every posterize keeps 0 bits
    assert any((augmented(strongest, seed) == 0).all() for seed in range(60))


def test_flip_mirrors():
    pixels = smooth_picture(64, 64)
    kept, _ = TrainTransform(48, PLAIN)(pixels, 3)
    mirrored, _ = TrainTransform(48, replace(PLAIN, horizontal_flip=1.0))(pixels, 3)
    np.testing.assert_array_equal(mirrored, kept[:, ::-1])


def test_train_transform_depends_on_the_seed_alone():
    pixels, transform = smooth_picture(100, 80), TrainTransform(32)
    first = [transform(pixels, seed) for seed in range(12)]
    random.seed(99)
    np.random.seed(99)
    again = [TrainTransform(32)(pixels, seed) for seed in reversed(range(12))][::-1]
    for (one, box_one), (two, box_two) in zip(first, again, strict=True):
        np.testing.assert_array_equal(one, two)
        assert box_one == box_two
    assert len({one.tobytes() for one, _ in first}) == 12


def test_erasing_boxes_are_timms():
    timm_erasing = RandomErasing(probability=0.25, mode="pixel", device="cpu")
    erased = 0
    for seed in range(400):
        image = torch.zeros(3, 32, 32)
        random.seed(seed)
        timm_erasing(image)
        random.seed(seed)
        box = random_erasing_box(32, 0.25)
        ours = erase(torch.zeros(1, 3, 32, 32), [] if box is None else [Erasure(0, box, seed)])[0]
        assert torch.equal(image != 0, ours != 0)
        erased += box is not None
    assert 70 < erased < 130  # a quarter of 400


def test_erasing_fills_unit_noise_and_nothing_else():
    images = torch.full((2, 3, 40, 40), 7.0)
    erase(images, [Erasure(1, (5, 10, 30, 20), seed=11)])
    patch = images[1, :, 5:35, 10:30]
    assert (images[0] == 7).all() and (images[1] == 7).sum() == 3 * (1600 - 600)
    assert abs(patch.mean()) < 0.1 and abs(patch.std() - 1) < 0.1
    again = erase(torch.zeros(2, 3, 40, 40), [Erasure(1, (5, 10, 30, 20), seed=11)])
    assert torch.equal(again[1, :, 5:35, 10:30], patch)


def test_normalise_is_to_tensor_and_normalize():
    images = torch.randint(0, 256, (2, 24, 20, 3), dtype=torch.uint8).permute(0, 3, 1, 2)
    expected = tv.normalize(images.float() / 255, MEAN, STD)
    result = normalise(images)
    assert result.is_contiguous()
    torch.testing.assert_close(result, expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("size, resize_to", [(224, None), (96, 256), (32, None)])
@pytest.mark.parametrize("width, height", [(500, 375), (375, 501), (40, 90), (224, 224)])
def test_eval_transform_is_torchvisions_resize_and_centre_crop(size, resize_to, width, height):
    transform = EvalTransform(size, resize_to)
    image = Image.fromarray(smooth_picture(width, height))
    resized = tv.resize(image, [transform.resize_to], InterpolationMode.BICUBIC)
    np.testing.assert_array_equal(transform(image), np.asarray(tv.center_crop(resized, [size])))
    np.testing.assert_array_equal(transform(image), transform(np.asarray(image)))


def test_eval_transform_refuses_a_crop_larger_than_the_picture():
    with pytest.raises(ValueError, match="resize_to 100"):
        EvalTransform(224, resize_to=100)
