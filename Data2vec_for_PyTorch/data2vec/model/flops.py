"""What a micro-batch of pretraining computes, in closed form; test_flops.py holds it to torch's counter.

FLOPs of matrix products and convolutions: the student forward and backward, the teacher forward. Rows that ours leaves
out of the last blocks count.
"""

from __future__ import annotations

from torch import nn

from common.run.utilisation import transformer_flops
from data2vec.model.multi.model import Data2VecMulti
from data2vec.model.text_model import Data2VecText
from data2vec.model.vision_model import Data2VecVision


def text_flops(model: Data2VecText, samples: int, length: int, masked: int) -> float:
    """Of `samples` samples of `length` tokens (with padding), `masked` of them hidden in all."""
    encoder = model.encoder.sentence_encoder.config
    blocks = transformer_flops(length, encoder.embed_dim, encoder.ffn_embed_dim, encoder.layers)
    return samples * (3 + 1) * blocks + 3 * masked * _weights(model.encoder.regression_head)


def vision_flops(model: Data2VecVision, samples: int, masked: int) -> float:
    """Of `samples` pictures, `masked` of their patches hidden in all."""
    config = model.config
    patches = (config.image_size // config.patch_size) ** 2
    stem = patches * _weights(model.patch_embed)
    stem *= 2 if config.ema_transformer_only else 3  # the pictures need no gradient; a whole teacher has its own
    hidden = int(config.embed_dim * config.mlp_ratio)
    blocks = transformer_flops(1 + patches, config.embed_dim, hidden, config.depth)
    head = _weights(model.final_proj) if config.use_final_proj else 0.0
    return samples * (stem + (3 + 1) * blocks) + 3 * masked * head


def multi_flops(model: Data2VecMulti, samples: int, length: int, masks: int, visible: int, hidden: int) -> float:
    """Of `samples` samples of `length` tokens under `masks` masks each.

    Args:
        visible: tokens that the student sees of a masked row.
        hidden: tokens that are predicted, in all masked rows.
    """
    block, modality = model.block, model.modality
    depth = len(model.blocks) + len(modality.context_encoder.blocks)
    sizes = (block.embed_dim, int(block.embed_dim * block.mlp_ratio), depth)
    student = masks * transformer_flops(modality.config.num_extra_tokens + visible, *sizes)
    teacher = transformer_flops(modality.config.num_extra_tokens + length, *sizes)
    decoder = masks * length * _weights(modality.decoder.blocks)
    whole_teacher = not model.config.ema_encoder_only and modality.config.ema_local_encoder
    stem = length * _weights(modality.local_encoder) * (3 if whole_teacher else 2)  # the pictures need no gradient
    return samples * (3 * (student + decoder) + teacher + stem) + 3 * hidden * _weights(modality.decoder.proj)


def _weights(module: nn.Module) -> float:
    """FLOPs of a position forward through linear layers and convolutions."""
    layers = (layer for layer in module.modules() if isinstance(layer, nn.Linear | nn.Conv1d | nn.Conv2d))
    return sum(2.0 * layer.weight.numel() for layer in layers)
