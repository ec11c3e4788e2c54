"""Masks, augmentation, schedules and the conversion to fine-tuning, against the reference."""

import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageEnhance

import beit2
from beit2.data.labelled import CentreCrop, CropAndFlip
from beit2.data.transforms import INTERPOLATIONS, Draw, TwoViewTransform, draw_jitter, jitter_crop, random_crop
from beit2.model.convert import spline_matrix
from beit2.training.optimizers import create_optimizer, layer_decay
from common.errors import UsageError


@pytest.mark.parametrize("name", ["m0", "m1", "m2"])
def test_masks_are_the_reference_s(golden, golden_arrays, name):
    case = golden("masking").json[name]
    generator = beit2.MaskingGenerator(
        tuple(case["window"]),
        case["num_masking_patches"],
        min_num_patches=case["min_num_patches"],
        max_num_patches=case["max_num_patches"],
    )
    random.seed(case["seed_first32"])
    np.random.seed(case["seed_first32"])
    masks = np.stack([generator() for _ in range(32)])
    assert masks.dtype == np.int32 and np.array_equal(masks, golden_arrays("masking")[f"{name}_first32"])


def test_mask_statistics(golden, golden_arrays):
    case = golden("masking").json["m0"]
    generator = beit2.MaskingGenerator(tuple(case["window"]), 75)
    masks = np.stack([generator(random.Random(i), np.random.default_rng(i)) for i in range(2000)])
    assert (masks.sum(axis=(1, 2)) == 75).all()
    pairs = (masks[:, 1:] & masks[:, :-1]).sum(axis=(1, 2)) + (masks[:, :, 1:] & masks[:, :, :-1]).sum(axis=(1, 2))
    error = 4 * case["std_adjacent_masked_pairs"] / 2000**0.5
    assert pairs.mean() == pytest.approx(case["mean_adjacent_masked_pairs"], abs=error + 0.01 * pairs.mean())
    assert np.abs(masks.mean(axis=0) - golden_arrays("masking")["m0_freq"]).max() < 0.06


def test_too_many_masked_patches():
    with pytest.raises(ValueError, match="75 patches to mask.*has 16"):
        beit2.MaskingGenerator((4, 4), 75)


@pytest.mark.parametrize("name", ["t0", "t1", "t2", "t3"])
def test_two_views_are_the_reference_s(golden, golden_arrays, name):
    case, arrays = golden("transforms").json[name], golden_arrays("transforms")
    options = case["args"]
    transform = TwoViewTransform(
        options["input_size"],
        options["second_input_size"],
        options["train_interpolation"],
        options["second_interpolation"],
        options["min_crop_scale"],
    )
    factors = (case["brightness"], case["contrast"], case["saturation"])
    interpolation = INTERPOLATIONS[options["train_interpolation"]]
    draw = Draw(tuple(case["jitter_order"]), factors, case["flip"], tuple(case["crop_ijhw"]), interpolation)
    first, second = transform.apply(Image.fromarray(arrays[f"{name}_input_u8"]), draw)
    assert (second is None) == (options["input_size"] == options["second_input_size"])
    imagenet = options["imagenet_default_mean_and_std"]
    mean, std = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)) if imagenet else ((0.5,) * 3, (0.5,) * 3)
    patches = (first.permute(2, 0, 1).float() / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(
        3, 1, 1
    )
    visual = (first if second is None else second).permute(2, 0, 1).float() / 255
    assert np.array_equal(patches.numpy(), arrays[f"{name}_patches"])
    assert np.array_equal(visual.numpy(), arrays[f"{name}_visual"])


def test_jitter_of_a_crop_is_the_crop_of_the_jitter():
    """Every order and many factors, against PIL's own enhancers on the whole picture."""
    rng, pixels = random.Random(0), np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    enhancers = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
    for _ in range(200):
        order = tuple(rng.sample(range(4), 4))
        factors = tuple(rng.uniform(0.6, 1.4) for _ in range(3))
        expected = image
        for operation in order:
            if operation < 3:
                expected = enhancers[operation](expected).enhance(factors[operation])
        box = (7, 3, 41, 30)
        assert np.array_equal(np.asarray(jitter_crop(image, box, order, factors)), np.asarray(expected.crop(box)))


def test_cropped_training_pictures_are_jittered_in_every_order():
    """CropAndFlip, whose draws are repeated here, against PIL's own enhancers on the whole picture."""
    pixels = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    enhancers, orders = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color), set()
    for seed in range(20):
        rng = random.Random(seed)
        order, factors = draw_jitter(0.4, rng)
        top, left, height, width = random_crop((50, 40), (0.3, 1.0), rng)
        expected = Image.fromarray(pixels)
        for operation in order:
            if operation < 3:
                expected = enhancers[operation](expected).enhance(factors[operation])
        expected = expected.crop((left, top, left + width, top + height)).resize((16, 16), Image.Resampling.BICUBIC)
        if rng.random() < 0.5:
            expected = expected.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        ours = CropAndFlip(16, 0.3, "bicubic", 0.4)(Image.fromarray(pixels), seed)
        assert np.array_equal(ours.numpy(), np.asarray(expected))
        orders.add(tuple(operation for operation in order if operation < 3))
    assert len(orders) == 6


@pytest.mark.parametrize(("side", "crop_pct"), [(32, None), (48, 0.9), (384, None), (384, 0.95)])
def test_evaluation_pictures_are_torchvision_s(side, crop_pct):
    from torchvision.transforms import CenterCrop, InterpolationMode, Resize

    share = crop_pct or (224 / 256 if side < 384 else 1.0)  # as in the reference
    resize, crop = Resize(int(side / share), InterpolationMode.BICUBIC), CenterCrop(side)
    rng = np.random.default_rng(0)
    for size in [(333, 500), (500, 333), (64, 64), (37, 91), (101, 100)]:
        image = Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8))
        assert np.array_equal(CentreCrop(side, crop_pct)(image).numpy(), np.asarray(crop(resize(image))))


@pytest.mark.parametrize("name", ["s0", "s1", "s2", "s3"])
def test_schedules(golden, golden_arrays, name):
    case = dict(golden("schedules").json[name])
    steps, base, final = case.pop("niter_per_ep"), case.pop("base_value"), case.pop("final_value")
    values = beit2.cosine_schedule(base, final, case.pop("epochs"), steps, **case)
    np.testing.assert_allclose(values, golden_arrays("schedules")[name], rtol=0, atol=1e-12)


def test_schedule_warmups_the_reference_cannot_do():
    assert beit2.cosine_schedule(1.0, 0.0, 2, 5, warmup_steps=4)[3] == 1.0
    with pytest.raises(ValueError, match="warm-up of 15 steps"):
        beit2.cosine_schedule(1.0, 0.0, 2, 5, warmup_epochs=3)


def test_conversion_to_a_larger_classifier(golden):
    g = golden("finetune_F1")
    classifier = beit2.build_classifier(**g.json["config"])
    state = beit2.convert_pretrained(g.state("pretrain_sd."), classifier)
    missing, unexpected = classifier.load_state_dict(state, strict=False)
    assert {"head.weight", "head.bias", "fc_norm.weight", "fc_norm.bias"} <= set(missing)
    assert "mask_token" in unexpected and "lm_head.weight" in unexpected
    for name, tensor in g.state().items():
        if "table" in name:
            torch.testing.assert_close(classifier.state_dict()[name], tensor, rtol=1e-4, atol=1e-5)
    classifier.load_state_dict({k: v for k, v in g.state().items() if k.startswith("head")}, strict=False)

    logits = classifier(g["images"])
    torch.testing.assert_close(logits, g["logits"], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(classifier.forward_features(g["images"]), g["features"], rtol=1e-4, atol=1e-5)
    tokens = classifier.forward_features(g["images"], return_patch_tokens=True)
    torch.testing.assert_close(tokens, g["patch_tokens"], rtol=1e-4, atol=1e-5)
    loss = F.cross_entropy(logits, g["targets"], label_smoothing=g.json["config"]["label_smoothing"])
    assert loss.item() == pytest.approx(g.json["loss"], abs=1e-5)
    loss.backward()
    for name, parameter in classifier.named_parameters():
        if g.json["grad_norms"][name] > 1e-6:
            assert parameter.grad.norm().item() == pytest.approx(g.json["grad_norms"][name], rel=1e-4), name


def test_spline_passes_through_its_points_and_keeps_cubics():
    x = np.array([-3.0, -1.5, -1.0, 0.0, 1.0, 1.2, 4.0])
    wanted = np.linspace(-3, 4, 29)
    np.testing.assert_allclose(spline_matrix(x, x), np.eye(7), atol=1e-12)
    np.testing.assert_allclose(spline_matrix(x, wanted) @ x**3, wanted**3, atol=1e-9)
    np.testing.assert_allclose(spline_matrix(x, np.array([-9.0, 9.0])) @ x, [-3.0, 4.0], atol=1e-12)


def test_layer_decay_groups(golden):
    model = beit2.create_model("beit_base_patch16_224", num_classes=10)
    by_id = {id(parameter): name for name, parameter in model.named_parameters()}
    layer_of, scales = layer_decay(12, 0.65)
    groups = beit2.parameter_groups(model, 0.05, layer_of=layer_of, layer_scales=scales)
    for group, expected in zip(groups, golden("param_groups").json["finetune_base_ld0.65"], strict=True):
        assert [by_id[id(parameter)] for parameter in group["params"]] == expected["params"]
        assert (group["weight_decay"], group["lr_scale"]) == (expected["weight_decay"], expected["lr_scale"])
    names = golden("state_dict_keys").json["finetune beit_base_patch16_224"]
    assert {name: [list(t.shape), str(t.dtype)] for name, t in model.state_dict().items()} == names


def test_pooling_by_cls_needs_only_its_row():
    torch.manual_seed(0)
    model = beit2.build_classifier(
        img_size=16, patch_size=8, embed_dim=16, depth=2, num_heads=2, num_classes=3, use_mean_pooling=False
    )
    images = torch.randn(2, 3, 16, 16)
    expected = model.head(model.forward_features(images, return_all_tokens=True)[:, 0])
    torch.testing.assert_close(model(images), expected)


@pytest.mark.parametrize(
    "name",
    "adamw sgd nesterov momentum adam nadam radam adamp sgdp adadelta adafactor rmsprop rmsproptf novograd nvnovograd "
    "lookahead_adamw lookahead_nesterov".split(),
)
def test_optimizer_names(name):
    model = torch.nn.Linear(3, 3)
    optimizer = create_optimizer(name, beit2.parameter_groups(model, 0.05), lr=0.1, eps=1e-8, betas=(0.9, 0.99))
    before = model.weight.clone()
    model(torch.ones(1, 3)).sum().backward()
    for _ in range(2):
        optimizer.step()
    assert not torch.equal(model.weight, before)


def test_optimizer_numbers_reach_it_or_are_refused():
    groups = beit2.parameter_groups(torch.nn.Linear(2, 2), 0.05)
    for name in ("rmsprop", "rmsproptf", "adamp", "adamw"):
        assert create_optimizer(name, groups, lr=0.1, eps=1e-3).param_groups[0]["eps"] == 1e-3, name
    for name, numbers, message in (
        ("adamw", {"betas": (0.9, 1.5)}, "--opt adamw: Invalid beta parameter"),
        ("adamw", {"lr": -1.0}, "--opt adamw: Invalid learning rate"),
        ("adahessian", {}, "--opt adahessian: needs second derivatives"),
    ):
        with pytest.raises(UsageError, match=message):
            create_optimizer(name, groups, **({"lr": 0.1} | numbers))


def test_unknown_names_are_errors():
    with pytest.raises(UsageError, match="--opt nonsense"):
        create_optimizer("nonsense", beit2.parameter_groups(torch.nn.Linear(2, 2), 0.0), lr=0.1)
    with pytest.raises(UsageError, match="--model beit_gigantic: unknown. Known: .*beit_base"):
        beit2.create_model("beit_gigantic")
    with pytest.raises(UsageError, match="--tokenizer_model x: unknown"):
        beit2.create_tokenizer("x")
