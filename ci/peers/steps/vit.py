"""ViT fine-tuning steps with MAE's recipe: ours, timm's module with timm's parts, transformers' ViT.

All mix the batch, run forward, loss and backward, and step AdamW; ours and timm's with layer decay and drop path.
"""
# ruff: noqa: I001

from __future__ import annotations

import itertools
from typing import Any

import vit  # noqa: F401  (before timm: repairs torchvision)
import timm.models.vision_transformer as timm_vit
import torch
from timm.data import Mixup
from timm.loss import SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2
from torch import Tensor, nn
from transformers import ViTConfig, ViTForImageClassification

from ci.peers.steps.step import Step
from common import device as devices
from vit import cpu_patches, npu_patches
from common.update import GuardedStep, loss_scale
from vit.data.loader import Batch, to_model_input
from vit.training import optim
from vit.training.metrics import soft_target_cross_entropy
from vit.data.augment import Augmentation
from vit.data.mixup import apply_mix, draw_mix
from vit.model.vision_transformer import PRESETS, create_model

SIZES = {
    "full": {"name": "vit_base_p16", "classes": 1000, "batch": 128},
    "cpu": {"name": "vit_base_p16", "classes": 1000, "batch": 8},
    "tiny": {"name": "vit_demo", "classes": 10, "batch": 4},
}
DROP_PATH = 0.1


def fixed_batch(size: dict[str, Any], device: torch.device) -> Batch:
    """uint8 pictures [B, 3, S, S] and classes [B]."""
    side = PRESETS[size["name"]]["image_size"]
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (size["batch"], 3, side, side), dtype=torch.uint8, generator=generator)
    classes = torch.randint(size["classes"], (size["batch"],), generator=generator)
    return Batch(images.to(device), classes.to(device), (), ())


def ours(size: str, device: torch.device, precision: str, compiled: bool) -> Step:
    """The parts that vit/engine.py's loop calls, in its order."""
    shape = SIZES[size]
    devices.seed_everything(0)
    model = create_model(shape["name"], shape["classes"], drop_path=DROP_PATH).to(device).train()
    npu_patches.apply(model, device)
    cpu_patches.apply(model, device)
    optimizer = optim.build_optimizer(model, weight_decay=0.05, layer_decay=0.65)
    update = GuardedStep(optimizer, list(model.parameters()), loss_scale(device, precision))
    mixing = Augmentation()
    batch, numbers = fixed_batch(shape, device), itertools.count()
    if compiled:
        model.compile()

    def step() -> Tensor:
        number = next(numbers)
        images, target = to_model_input(batch, device)
        mix = draw_mix(mixing, *images.shape[2:], seed=0, step=number, rank=0)
        images, soft = apply_mix(images, target, mix, shape["classes"], mixing.label_smoothing)
        devices.seeded(0, number)
        with devices.autocast(device, precision):
            logits = model(images)
        loss = soft_target_cross_entropy(logits, soft)
        update.scaled(loss).backward()
        optim.set_learning_rate(optimizer, 1e-6)
        update(number + 1, loss.detach())
        return loss.detach()

    return Step(step, shape["batch"], "images")


def timm_step(size: str, device: torch.device, precision: str, compiled: bool) -> Step:
    shape = SIZES[size]
    devices.seed_everything(0)
    model = timm_vit.VisionTransformer(
        **{"img_size" if key == "image_size" else key: value for key, value in PRESETS[shape["name"]].items()},
        num_classes=shape["classes"],
        global_pool="avg",
        drop_path_rate=DROP_PATH,
    )
    return _plain(model, shape, device, precision, compiled, layer_decay=0.65)


def transformers_step(size: str, device: torch.device, precision: str, compiled: bool) -> Step:
    shape = SIZES[size]
    preset = PRESETS[shape["name"]]
    devices.seed_everything(0)
    config = ViTConfig(
        hidden_size=preset["embed_dim"],
        num_hidden_layers=preset["depth"],
        num_attention_heads=preset["num_heads"],
        intermediate_size=4 * preset["embed_dim"],
        image_size=preset["image_size"],
        patch_size=preset["patch_size"],
        num_labels=shape["classes"],
    )
    return _plain(ViTForImageClassification(config), shape, device, precision, compiled)


def _plain(
    model: nn.Module, shape: dict[str, Any], device: torch.device, precision: str, compiled: bool, **groups: Any
) -> Step:
    """A plain step with timm's mixup, loss and optimizer factory (its AdamW is torch's, for-each)."""
    model.to(device).train()
    optimizer = create_optimizer_v2(model, opt="adamw", lr=1e-6, weight_decay=0.05, **groups)
    mixup = Mixup(mixup_alpha=0.8, cutmix_alpha=1.0, label_smoothing=0.1, num_classes=shape["classes"])
    criterion = SoftTargetCrossEntropy()
    batch = fixed_batch(shape, device)
    if compiled:
        model.compile()

    def step() -> Tensor:
        images, target = to_model_input(batch, device)
        images, soft = mixup(images, target)
        with devices.autocast(device, precision):
            output = model(images)
            loss = criterion(output if isinstance(output, Tensor) else output.logits, soft)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return Step(step, shape["batch"], "images")


SIDES = {"ours": ours, "timm": timm_step, "transformers": transformers_step}
