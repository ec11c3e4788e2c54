"""CLIP training steps on COCO-like captions: ours, the upstream Trainer example's, open_clip's ViT-B-32."""

from __future__ import annotations

import itertools
from typing import Any

import clip_pretraining  # noqa: F401  mends torchvision for transformers

# isort: split
import numpy as np
import torch
from torch import Tensor, nn
from transformers import CLIPVisionConfig, RobertaConfig, VisionTextDualEncoderConfig, VisionTextDualEncoderModel

from ci.peers.steps.step import Step
from clip_pretraining import cpu_patches, npu_patches
from clip_pretraining.data.tokenization import pad_captions
from clip_pretraining.evaluation.encoder import normalise_pixels
from clip_pretraining.model import layers
from clip_pretraining.model.loading import ImageSettings
from clip_pretraining.model.loss import contrastive_loss
from common import device as devices
from common.errors import UsageError

_BASE = {"width": 768, "depth": 12, "heads": 12, "side": 224, "patch": 32, "vocab": 50265, "dropout": 0.1}
SIZES: dict[str, dict[str, Any]] = {
    "full": _BASE | {"batch": 256},
    "cpu": _BASE | {"batch": 8},
    "tiny": {"width": 32, "depth": 2, "heads": 2, "side": 32, "patch": 8, "vocab": 500, "dropout": 0.0, "batch": 4},
}
# tokens of COCO captions, <s> and </s> included: mean 13, the longest of a batch of 8 about 16
LENGTHS = (11, 12, 12, 13, 13, 14, 15, 16)
EXAMPLE_LENGTH = 128  # of run_clip.py, to which every caption is padded
OPEN_CLIP_LENGTH = 77
PAD = 1


def dual_encoder(shape: dict[str, Any], device: torch.device) -> VisionTextDualEncoderModel:
    """CLIP-ViT and RoBERTa as save_clip_roberta.py joins them, in training mode."""
    devices.seed_everything(0)
    tower = {
        "hidden_size": shape["width"],
        "num_hidden_layers": shape["depth"],
        "num_attention_heads": shape["heads"],
        "intermediate_size": 4 * shape["width"],
    }
    vision = CLIPVisionConfig(**tower, image_size=shape["side"], patch_size=shape["patch"])
    text = RobertaConfig(
        **tower,
        vocab_size=shape["vocab"],
        max_position_embeddings=514,
        type_vocab_size=1,
        hidden_dropout_prob=shape["dropout"],
        attention_probs_dropout_prob=shape["dropout"],
    )
    config = VisionTextDualEncoderConfig.from_vision_text_configs(vision, text)
    return VisionTextDualEncoderModel(config).to(device).train()


def pairs(shape: dict[str, Any], device: torch.device) -> tuple[Tensor, list[np.ndarray]]:
    """uint8 pixels [B, 3, S, S] on the device, and the captions' token ids."""
    draw = np.random.default_rng(0)
    lengths = [LENGTHS[i % len(LENGTHS)] for i in range(shape["batch"])]
    captions = [draw.integers(5, shape["vocab"], length).astype(np.int32) for length in lengths]
    pixels = draw.integers(0, 256, (shape["batch"], 3, shape["side"], shape["side"]), dtype=np.uint8)
    return torch.from_numpy(pixels).to(device), captions


def mean_and_std(device: torch.device) -> tuple[Tensor, Tensor]:
    settings = ImageSettings(224)
    return torch.tensor(settings.mean, device=device), torch.tensor(settings.std, device=device)


def adamw(model: nn.Module) -> torch.optim.AdamW:
    return torch.optim.AdamW(model.parameters(), lr=1e-6, weight_decay=0.1, fused=True)


def update(model: nn.Module, optimizer: torch.optim.Optimizer, loss: Tensor) -> Tensor:
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return loss.detach()


def ours(size: str, device: torch.device, precision: str, compiled: bool) -> Step:
    """As clip_pretraining/training/trainer.py: uint8 pixels, captions padded to their bucket, the loss of loss.py."""
    shape = SIZES[size]
    model = dual_encoder(shape, device)
    layers.install(model)
    cpu_patches.apply(model, device)
    npu_patches.apply(model, device)
    optimizer, numbers = adamw(model), itertools.count()
    pixels, captions = pairs(shape, device)
    text = {name: ids.to(device) for name, ids in pad_captions(captions, PAD, EXAMPLE_LENGTH).items()}
    mean, std = mean_and_std(device)
    if compiled:
        model.compile()

    def step() -> Tensor:
        devices.seeded(0, next(numbers))
        with devices.autocast(device, precision):
            output = model(**text, pixel_values=normalise_pixels(pixels, mean, std))
        embeds = output.image_embeds.float(), output.text_embeds.float()
        return update(model, optimizer, contrastive_loss(*embeds, model.logit_scale))

    return Step(step, shape["batch"], "pairs")


def upstream(size: str, device: torch.device, precision: str, compiled: bool) -> Step:
    """As transformers' example run_clip.py: float pixels, padding="max_length", the model's own loss."""
    shape = SIZES[size]
    model = dual_encoder(shape, device)
    optimizer = adamw(model)
    pixels, captions = pairs(shape, device)
    ids = torch.full((shape["batch"], EXAMPLE_LENGTH), PAD)
    for row, tokens in enumerate(captions):
        ids[row, : len(tokens)] = torch.from_numpy(tokens.astype(np.int64))
    text = {"input_ids": ids.to(device), "attention_mask": (ids != PAD).long().to(device)}
    images = normalise_pixels(pixels, *mean_and_std(device))
    if compiled:
        model.compile()

    def step() -> Tensor:
        with devices.autocast(device, precision):
            output = model(**text, pixel_values=images, return_loss=True)
        return update(model, optimizer, output.loss)

    return Step(step, shape["batch"], "pairs")


def open_clip_step(size: str, device: torch.device, precision: str, compiled: bool) -> Step:
    """open_clip's ViT-B-32 with its own loss; 77 positions whatever the captions."""
    try:
        import open_clip
    except ImportError:
        raise UsageError("open_clip is not installed: pip install -r requirements-dev.txt") from None
    if size == "tiny":
        raise UsageError("open_clip has no tiny model: choose the size full or cpu")
    shape = SIZES[size]
    devices.seed_everything(0)
    model = open_clip.create_model("ViT-B-32").to(device).train()
    optimizer, criterion = adamw(model), open_clip.ClipLoss()
    pixels, captions = pairs(shape, device)
    ids = torch.zeros(shape["batch"], OPEN_CLIP_LENGTH, dtype=torch.long)
    for row, tokens in enumerate(captions):
        ids[row, : len(tokens)] = torch.from_numpy(tokens.astype(np.int64)).clamp(max=49000)
        ids[row, len(tokens) - 1] = 49407  # the end-of-text token, where open_clip pools
    ids, images = ids.to(device), normalise_pixels(pixels, *mean_and_std(device))
    if compiled:
        model.compile()

    def step() -> Tensor:
        with devices.autocast(device, precision):
            image, text, scale = model(images, ids)
        return update(model, optimizer, criterion(image.float(), text.float(), scale))

    return Step(step, shape["batch"], "pairs")


SIDES = {"ours": ours, "upstream example": upstream, "open_clip": open_clip_step}
