"""BEiT v2 pretraining steps, tokenizer included: ours and the reference's plain one, on the same weights and batch."""

from __future__ import annotations

import contextlib
import functools
import itertools
import random
from typing import Any

import numpy as np
import torch
from torch import Tensor

import beit2
from beit2 import device_patches
from beit2.compiled_blocks import compile_blocks
from beit2.image_data import Batch, Normalizer
from beit2.training.optimizers import create_optimizer
from beit2.training.pretraining_loss import token_loss
from beit2.training.run import gradient_step
from ci.peers import beit2_plain
from ci.peers.steps.step import Step
from common import device as devices
from common.errors import UsageError
from common.update import GuardedStep, loss_scale

MODEL, TOKENIZER = "beit_base_patch16_224_8k_vocab_cls_pt", "vqkd_encoder_base_decoder_1x768x12_clip"
_TINY = {"img_size": 32, "patch_size": 8}
SIZES: dict[str, dict[str, Any]] = {
    "full": {"batch": 64, "masked": 75, "model": {}, "tokenizer": {}},
    "cpu": {"batch": 4, "masked": 75, "model": {}, "tokenizer": {}},
    "tiny": {
        "batch": 4,
        "masked": 6,
        "model": _TINY | {"embed_dim": 32, "depth": 4, "num_heads": 2, "early_layers": 2, "head_layers": 1}
        | {"vocab_size": 32},
        "tokenizer": _TINY | {"dim": 32, "depth": 1, "heads": 2, "n_code": 32, "code_dim": 8},
    },
}  # fmt: skip
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CLIP_GRAD = 3.0
DTYPES = {"fp32": None, "bf16": torch.bfloat16}


def build(size: str, device: torch.device):
    """(model, tokenizer, batch on the device; its masks stay on the host, where the loop has them)."""
    shape = SIZES[size]
    devices.seed_everything(0)
    model = beit2.create_model(MODEL, drop_path_rate=0.1, **shape["model"]).to(device).train()
    tokenizer = beit2.create_tokenizer(TOKENIZER, **shape["tokenizer"]).to(device)
    side = shape["model"].get("img_size", 224)
    window = side // shape["model"].get("patch_size", 16)
    masking = beit2.MaskingGenerator((window, window), shape["masked"], min_num_patches=2)
    masks = [masking(random.Random(i), np.random.default_rng(i)) for i in range(shape["batch"])]
    images = torch.randint(0, 256, (shape["batch"], side, side, 3), dtype=torch.uint8)
    return model, tokenizer, Batch(images.to(device), None, torch.from_numpy(np.stack(masks)).bool())


def ours(size: str, device: torch.device, precision: str, compiled: bool) -> Step:
    model, tokenizer, batch = build(size, device)
    tokenizer.for_encoding(DTYPES[precision])
    device_patches.apply(model, tokenizer, device)
    optimizer = create_optimizer(
        "adamw", beit2.parameter_groups(model, 0.05), lr=1e-5, betas=(0.9, 0.999), device=device
    )
    guarded = GuardedStep(optimizer, model.parameters(), loss_scale(device, precision), clip_norm=CLIP_GRAD)
    loss_of = functools.partial(token_loss, model, tokenizer, Normalizer(MEAN, STD, device), precision)
    if compiled:
        compile_blocks(model, device)  # as --compile does
        tokenizer.encoder.compile()
    numbers = itertools.count()

    def step() -> Tensor:
        number = next(numbers)
        devices.seeded(0, number)
        return gradient_step(model, guarded, loss_of, [batch], number + 1)["loss"]

    return Step(step, len(batch.mask), "images")


def plain(size: str, device: torch.device, precision: str, compiled: bool) -> Step:
    if compiled:
        raise UsageError("the reference's BEiT v2 step is plain functions: it is measured without torch.compile only")
    model, tokenizer, batch = build(size, device)
    tokenizer.requires_grad_(False).eval()
    optimizer = torch.optim.AdamW(beit2.parameter_groups(model, 0.05), lr=1e-5, betas=(0.9, 0.999))
    normalizer, mask, numbers = Normalizer(MEAN, STD, device), batch.mask.flatten(1).to(device), itertools.count()
    autocast = contextlib.nullcontext
    if precision != "fp32":
        autocast = functools.partial(torch.autocast, device.type, dtype=DTYPES[precision])

    def step() -> Tensor:
        devices.seeded(0, next(numbers))
        loss, _ = beit2_plain.step(
            model, tokenizer, optimizer, *normalizer.views(batch), mask, CLIP_GRAD, autocast=autocast
        )
        return torch.tensor(loss)

    return Step(step, len(batch.mask), "images")


SIDES = {"ours": ours, "plain": plain}
