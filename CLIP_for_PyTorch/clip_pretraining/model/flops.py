"""What a training step of both towers computes, in closed form; test_flops.py holds it to torch's counter.

FLOPs of matrix products as `transformers` has them: rows that ours leaves out of the last blocks, and products of
padding that our CPU patches skip, count.
"""

from __future__ import annotations

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from clip_pretraining.model import patch_dropout
from common.run.utilisation import transformer_flops


def step_flops(model: PreTrainedModel, pairs: int, text_tokens: int) -> float:
    """Forward and backward of `pairs` pairs whose captions are padded to `text_tokens`; the loss itself is left out.

    A tower without a weight to train goes forward only; of one with LoRA the frozen weights have no gradient of theirs.
    """
    vision, text = model.config.vision_config, model.config.text_config
    patches = (vision.image_size // vision.patch_size) ** 2
    stem = 2.0 * patches * vision.num_channels * vision.patch_size**2 * vision.hidden_size
    towers = _tower(model.vision_model, vision, patch_dropout.kept(model, patches) + 1)
    towers += _tower(model.text_model, text, text_tokens)
    ends = [model.visual_projection, model.text_projection]
    if (pooler := getattr(model.text_model, "pooler", None)) is not None:  # RoBERTa's
        ends.append(pooler.dense)
    towers += sum(2.0 * layer.weight.numel() * _passes(layer) for layer in ends)
    # nothing asks for the gradient of the pictures
    return pairs * (stem * (1 if _added(model.vision_model) else min(2, _passes(model.vision_model))) + towers)


def _tower(module: nn.Module, config: PretrainedConfig, tokens: int) -> float:
    width, depth = config.hidden_size, config.num_hidden_layers
    forward = transformer_flops(tokens, width, config.intermediate_size, depth)
    if not (added := _added(module)):
        return _passes(module) * forward
    attention = 4.0 * tokens**2 * width * depth  # products of which both factors have a gradient
    unasked = 6.0 * tokens * width**2  # of what the first block's queries, keys and values are made from
    return 2 * forward + attention - unasked + 3 * 2.0 * tokens * added


def _added(module: nn.Module) -> int:
    """How many numbers LoRA has added."""
    return sum(p.numel() for name, p in module.named_parameters() if ".lora_" in name)


def _passes(module: nn.Module) -> float:
    trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
    return 2 + trained / sum(p.numel() for p in module.parameters()) if trained else 1
