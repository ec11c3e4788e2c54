"""Weights of image models from elsewhere: the paper's checkpoints, and Hugging Face `Data2VecVisionModel` folders."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from common.checkpoint_file import CheckpointError
from common.run.new_file import readable

if TYPE_CHECKING:  # it brings timm, which a text run does without
    from data2vec.model.vision_model import Data2VecVision

# below "blocks.N." and "encoder.layer.N."
_BLOCK = {
    "norm1": "layernorm_before",
    "attn.proj": "attention.output.dense",
    "norm2": "layernorm_after",
    "mlp.0": "intermediate.dense",
    "mlp.2": "output.dense",
}
_SELF = "attention.attention"
_SINGLE = {
    "cls_emb": "embeddings.cls_token",
    "mask_emb": "embeddings.mask_token",
    "patch_embed.conv.weight": "embeddings.patch_embeddings.projection.weight",
    "patch_embed.conv.bias": "embeddings.patch_embeddings.projection.bias",
    "encoder.rel_pos_bias.relative_position_bias_table": "encoder.relative_position_bias.relative_position_bias_table",
    "encoder.norm.weight": "layernorm.weight",
    "encoder.norm.bias": "layernorm.bias",
}
# ours <- facebookresearch/data2vec_vision, which has BEiT's names
_PAPER = {
    "cls_emb": "cls_token",
    "mask_emb": "mask_token",
    "patch_embed.conv.": "patch_embed.proj.",
    "final_proj.": "lm_head.",
    "encoder.rel_pos_bias.": "rel_pos_bias.",
    "encoder.blocks.": "blocks.",
    "encoder.norm.": "norm.",
}


def to_our_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state_dict of fairseq, or of the paper's code, under our names; indices that follow from sizes left out."""
    result = {}
    for name, value in state.items():
        if name.endswith("relative_position_index"):
            continue
        if "cls_token" in state:
            for ours, theirs in _PAPER.items():
                if name.startswith(theirs):
                    name = ours + name.removeprefix(theirs)
                    break
            name = name.replace(".mlp.fc1.", ".mlp.0.").replace(".mlp.fc2.", ".mlp.2.")
        result[name] = value
    return result


def export_huggingface_vision(model: Data2VecVision, folder: str | Path) -> None:
    """Writes `config.json` and `model.safetensors` of a `Data2VecVisionModel`: encoder, final norm and mask token.

    Raises:
        FileExistsError: the folder has a model already.
        ValueError: an encoder with a bias table in each block.
    """
    from transformers import Data2VecVisionConfig, Data2VecVisionModel

    config, folder = model.config, Path(folder)
    if not config.shared_rel_pos_bias:
        raise ValueError("model.shared_rel_pos_bias=false is not exported: the published models share one table")
    if (folder / "config.json").exists():
        raise FileExistsError(f"{folder} holds a model already and is not overwritten")
    theirs = Data2VecVisionModel(
        Data2VecVisionConfig(
            hidden_size=config.embed_dim,
            num_hidden_layers=config.depth,
            num_attention_heads=config.num_heads,
            intermediate_size=int(config.embed_dim * config.mlp_ratio),
            layer_norm_eps=config.norm_eps,
            image_size=config.image_size,
            patch_size=config.patch_size,
            use_mask_token=True,
            use_shared_relative_position_bias=True,
            layer_scale_init_value=config.layer_scale_init_value,
            drop_path_rate=config.drop_path,
            use_mean_pooling=False,  # keeps the final norm; fine-tuning turns it on and starts a norm of its own
        )
    )
    ours = model.state_dict()
    state = {theirs_name: ours[name] for name, theirs_name in _SINGLE.items()}
    for i in range(config.depth):
        state |= _block_to_huggingface(ours, f"encoder.blocks.{i}.", f"encoder.layer.{i}.")
    theirs.load_state_dict(state)
    theirs.save_pretrained(folder)
    readable(folder)


def _block_to_huggingface(ours: Mapping[str, Tensor], prefix: str, to: str) -> dict[str, Tensor]:
    query, key, value = ours[f"{prefix}attn.qkv.weight"].chunk(3)
    state = {
        f"{to}{_SELF}.query.weight": query,
        f"{to}{_SELF}.key.weight": key,
        f"{to}{_SELF}.value.weight": value,
        f"{to}{_SELF}.query.bias": ours[f"{prefix}attn.q_bias"],
        f"{to}{_SELF}.value.bias": ours[f"{prefix}attn.v_bias"],
    }
    for name, theirs in _BLOCK.items():
        for kind in ("weight", "bias"):
            state[f"{to}{theirs}.{kind}"] = ours[f"{prefix}{name}.{kind}"]
    for name, theirs in (("gamma_1", "lambda_1"), ("gamma_2", "lambda_2")):
        if f"{prefix}{name}" in ours:
            state[f"{to}{theirs}"] = ours[f"{prefix}{name}"]
    return state


def load_huggingface_vision(folder: str | Path) -> dict[str, dict[str, Tensor]]:
    """{"model": weights under our names} of a `Data2VecVisionModel` folder; without a head, and maybe without mask
    token and final norm.

    Raises:
        CheckpointError: not such a folder, or a model without a shared bias table.
    """
    from transformers import Data2VecVisionModel

    try:
        theirs = Data2VecVisionModel.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{folder}: not a Data2VecVisionModel folder, as is needed ({str(error).splitlines()[0]})"
        ) from None
    if theirs.config.model_type != "data2vec-vision" or not theirs.config.use_shared_relative_position_bias:
        raise CheckpointError(f"{folder}: a data2vec-vision model with a shared relative position bias is needed")
    state = theirs.state_dict()
    ours = {name: state[theirs_name] for name, theirs_name in _SINGLE.items() if theirs_name in state}
    for i in range(theirs.config.num_hidden_layers):
        ours |= _block_from_huggingface(state, f"encoder.layer.{i}.", f"encoder.blocks.{i}.")
    return {"model": ours}


def _block_from_huggingface(state: Mapping[str, Tensor], prefix: str, to: str) -> dict[str, Tensor]:
    weights = [state[f"{prefix}{_SELF}.{name}.weight"] for name in ("query", "key", "value")]
    ours = {
        f"{to}attn.qkv.weight": torch.cat(weights),
        f"{to}attn.q_bias": state[f"{prefix}{_SELF}.query.bias"],
        f"{to}attn.v_bias": state[f"{prefix}{_SELF}.value.bias"],
    }
    for name, theirs in _BLOCK.items():
        for kind in ("weight", "bias"):
            ours[f"{to}{name}.{kind}"] = state[f"{prefix}{theirs}.{kind}"]
    for name, theirs in (("gamma_1", "lambda_1"), ("gamma_2", "lambda_2")):
        if f"{prefix}{theirs}" in state:
            ours[f"{to}{name}"] = state[f"{prefix}{theirs}"]
    return ours
