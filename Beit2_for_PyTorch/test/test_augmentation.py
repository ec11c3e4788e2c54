"""timm's augmentation in fine-tuning: over more draws than it takes to meet each of its rare cases."""

import random

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import auto_augment

from beit2 import finetuning_options as setup
from common.data.posterize_repair import repair_posterize


def picture():
    return Image.effect_noise((16, 16), 60).convert("RGB")


def test_ten_thousand_pictures_of_the_default_recipe():
    options = setup.read_options(["--data_path", "x", "--input_size", "16"])
    transform, image = setup._training_transform(options), picture()
    rand_augment = next(t for t in transform.transform.transforms if isinstance(t, auto_augment.RandAugment))
    random.seed(0)
    np.random.seed(0)
    for _ in range(10_000):
        assert rand_augment(image).size == image.size
    for seed in range(300):
        assert transform(image, seed).isfinite().all()
    assert torch.equal(transform(image, 5), transform(image, 5))  # a function of its seed


@pytest.mark.parametrize("policy", ["rand-m9-mstd0.5-inc1", "rand-m10-n4-inc1", "rand-m10-n4", "augmix-m10", "v0"])
def test_policies_at_their_strongest(policy):
    options = setup.read_options(["--data_path", "x", "--input_size", "16", "--aa", policy])
    transform, image = setup._training_transform(options), picture()
    for seed in range(200):
        assert transform(image, seed).isfinite().all()


def test_every_operation_at_every_magnitude():
    repair_posterize()
    image = picture()
    for name in auto_augment.NAME_TO_OP:
        for magnitude in (level / 4 for level in range(41)):
            operation = auto_augment.AugmentOp(
                name, prob=1.0, magnitude=magnitude, hparams={"magnitude_std": 0.5, "translate_const": 7}
            )
            for _ in range(3):
                assert operation(image).size == image.size


def test_posterize_keeps_the_bits_it_is_asked_to_keep():
    repair_posterize()
    keep = auto_augment.NAME_TO_OP["PosterizeIncreasing"]
    pixels = torch.from_numpy(np.array(picture()))
    for bits in range(9):
        mask = 0xFF & ~(2 ** (8 - bits) - 1)
        kept = torch.from_numpy(np.array(keep(Image.fromarray(pixels.numpy()), bits)))
        assert torch.equal(kept, pixels & mask), bits
