"""The closed form of a step's FLOPs is what torch counts."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from vit.model import lora
from vit.model.flops import flops_per_image
from vit.model.vision_transformer import build_model, create_model


def counted(model) -> float:
    size = model.config.image_size
    counter = FlopCounterMode(display=False)
    with sdpa_kernel(SDPBackend.MATH), counter:
        model(torch.zeros(2, 3, size, size)).sum().backward()
    return counter.get_total_flops() / 2


@pytest.mark.parametrize("train", ["all", "head", "lora"])
def test_a_vit(train):
    model = build_model(32, 8, 48, 3, 4, 10)
    if train == "head":
        model.requires_grad_(False).head.requires_grad_(True)
    if train == "lora":
        lora.add(model, 2, 4.0, "qkv,proj,fc1,fc2")
    known = flops_per_image(model, head_only=train == "head", frozen=train == "lora")
    assert known == pytest.approx(
        counted(model), rel=0.01 if train != "lora" else 0.2
    )  # small as it is, additions show


def test_a_convolutional_stem():
    model = create_model("vit_demo_conv", num_classes=9)
    assert flops_per_image(model) == pytest.approx(counted(model), rel=0.01)
    lora.add(model, 1, 2.0, "qkv", "stem")
    assert flops_per_image(model, frozen=True) == pytest.approx(counted(model), rel=0.01)
