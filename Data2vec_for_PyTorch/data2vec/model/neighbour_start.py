"""A start for small text models trained from nothing: heads that look one or two places to the left or right.

Trained BERTs have such heads (Clark et al. 2019, arXiv:1906.04341, section 3.1); a model that trains for minutes has
spent them before it has any. Ours: an initial value alone, of learned positions and of query and key weights, which all
train on. In the spirit of "mimetic" initialisation (Trockman and Kolter 2023, arXiv:2305.09828).
"""

from __future__ import annotations

import math

import torch

from data2vec.model.encoder import SentenceEncoder

REMAINING = 0.3  # share of the random query and key weights that stays


@torch.no_grad()
def look_at_neighbours(encoder: SentenceEncoder, std: float) -> None:
    """Changes the initial weights of an encoder in place.

    Positions become waves of D/2 - 1 frequencies (D: the width of a head), of the norm that N(0, std) would have: up to
    D places apart, two different ones have hardly any product. A head's query turns each wave by the head's offset, so
    that it meets the key of the place it looks at; heads have the offsets -1, 1, -2, 2, ...

    Raises:
        ValueError: more positions than a head's waves tell apart.
    """
    config = encoder.config
    dim, heads = config.embed_dim, config.attention_heads
    width = dim // heads
    count = width // 2 - 1
    if count < 1 or not 2 <= config.max_source_positions <= width:
        raise ValueError(
            f"model.initial_attention=neighbours tells {width} places apart (model.transformer.encoder.embed_dim {dim} "
            f"over attention_heads {heads}), and model.transformer.max_source_positions={config.max_source_positions}: "
            "take fewer positions or heads, or model.initial_attention=random"
        )
    frequency = 2 * math.pi * torch.arange(1, count + 1) / width  # [F]
    place = torch.arange(len(encoder.embed_positions.weight))
    angle = place[:, None] * frequency  # [P, F]
    waves = torch.stack([angle.cos(), angle.sin()], dim=2).flatten(1)  # [P, 2F]
    encoder.embed_positions.weight.zero_()
    encoder.embed_positions.weight[:, : 2 * count] = std * math.sqrt(dim / count) * waves
    encoder.embed_positions.weight[config.pad_index] = 0
    for layer in encoder.layers:
        query, key = layer.self_attn.q_proj.weight, layer.self_attn.k_proj.weight  # [C, C]
        query.mul_(REMAINING)
        key.mul_(REMAINING)
        for head in range(heads):
            offset = (head // 2 + 1) * (1 if head % 2 else -1)
            first = head * width
            rows, columns = slice(first, first + 2 * count), slice(0, 2 * count)
            query[rows, columns] += _turn(offset * frequency)
            key[rows, columns] += torch.eye(2 * count)


def _turn(angle: torch.Tensor) -> torch.Tensor:
    """[2F, 2F]: each pair of (cos, sin) turned by its angle [F]."""
    cos, sin = angle.cos(), angle.sin()
    return torch.block_diag(*torch.stack([cos, -sin, sin, cos], dim=1).unflatten(1, (2, 2)))
