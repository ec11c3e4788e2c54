"""The tensors of our models under the names that transformers' Beit models give them, and back."""

from __future__ import annotations

import re

import torch
from torch import Tensor

_INDEX = "relative_position_index"
# of a whole model, ours -> transformers'
_OUTSIDE = {
    "cls_token": "embeddings.cls_token",
    "mask_token": "embeddings.mask_token",
    "pos_embed": "embeddings.position_embeddings",
    "patch_embed.proj": "embeddings.patch_embeddings.projection",
    "rel_pos_bias": "shared_position_bias",
    "fc_norm": "pooler.layernorm",
    "norm": "layernorm",
}
_TASKS = {"lm_head": "lm_head", "head": "classifier"}
# within a block
_IN_BLOCK = {
    "gamma_1": "lambda_1",
    "gamma_2": "lambda_2",
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
    "attn.q_bias": "attention.q_proj.bias",
    "attn.v_bias": "attention.v_proj.bias",
    "attn.proj": "attention.o_proj",
    "attn.relative_position_bias_table": "relative_position_bias.relative_position_bias_table",
    "mlp": "mlp",
}


def to_transformers(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Our tensors under transformers' names; those of the encoder, not of its tasks, after `prefix`."""
    encoder = {ours: prefix + theirs for ours, theirs in _OUTSIDE.items()}
    if "lm_head.weight" in state:
        encoder["norm"] = _OUTSIDE["norm"]  # the masked image model's own
    out: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if not name.startswith("blocks."):
            out[_renamed(name, encoder | _TASKS)] = tensor
            continue
        _, number, rest = name.split(".", 2)
        block = f"{prefix}layers.{number}."
        if rest == "attn.qkv.weight":
            for part, rows in zip("qkv", tensor.chunk(3), strict=True):
                out[f"{block}attention.{part}_proj.weight"] = rows
        elif not rest.endswith(_INDEX):
            out[block + _renamed(rest, _IN_BLOCK)] = tensor
    return out


def from_transformers(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A Beit model's `state_dict()` under our names. What only transformers has (an index of positions) is left out.

    Raises:
        KeyError: a tensor that no Beit model of these tasks has.
    """
    whole = {theirs: ours for ours, theirs in (_OUTSIDE | _TASKS).items()}
    in_block = {theirs: ours for ours, theirs in _IN_BLOCK.items()}
    out: dict[str, Tensor] = {}
    for name, tensor in state.items():
        name = name.removeprefix("beit.")
        block = re.fullmatch(r"layers\.(\d+)\.(.*)", name)
        if name.endswith(_INDEX):
            continue
        if block is None:
            out[_renamed(name, whole)] = tensor
        elif not re.fullmatch(r"attention\.[qkv]_proj\.weight", block[2]):
            out[f"blocks.{block[1]}.{_renamed(block[2], in_block)}"] = tensor
        elif block[2] == "attention.q_proj.weight":
            parts = [state[name_of] for name_of in _beside(state, block[1])]
            out[f"blocks.{block[1]}.attn.qkv.weight"] = torch.cat(parts)
    return out


def _beside(state: dict[str, Tensor], number: str) -> list[str]:
    """The names of a block's three projections, with the prefix that this state dict has."""
    prefix = "beit." if f"beit.layers.{number}.attention.q_proj.weight" in state else ""
    return [f"{prefix}layers.{number}.attention.{part}_proj.weight" for part in "qkv"]


def _renamed(name: str, names: dict[str, str]) -> str:
    for old, new in names.items():
        if name == old or name.startswith(f"{old}."):
            return new + name.removeprefix(old)
    raise KeyError(name)
