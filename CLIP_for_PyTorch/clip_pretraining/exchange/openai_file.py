"""Weights in one file under OpenAI's names, read and written: no configuration beside them, so shapes must tell it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import CLIPConfig, CLIPModel, PreTrainedModel, PreTrainedTokenizerBase

from clip_pretraining.data.tokenization import openai_tokenizer
from clip_pretraining.exchange import names, open_clip_folder
from clip_pretraining.exchange.tensor_file import read_tensors
from clip_pretraining.model import loading
from clip_pretraining.model.construction import Built
from clip_pretraining.model.loading import ImageSettings
from common.errors import UsageError

HEAD_WIDTH = 64  # of all of OpenAI's models; nothing in a file tells it
FILE = "clip.pt"


def write(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, settings: ImageSettings, folder: Path) -> str:
    """FOLDER/clip.pt for `clip.load` and `open_clip.load_openai_model`; returns how to load it.

    Raises:
        UsageError: OpenAI's program would build another model from the file.
    """
    config = open_clip_folder.model_config(model, folder)
    text, vision = config["text_cfg"], config["vision_cfg"]
    heads = text.get("width", 0) // HEAD_WIDTH
    usual, last = ImageSettings(settings.size), tokenizer.eos_token_id == len(tokenizer) - 1
    wrong = {
        "a text tower of CLIP's": "hf_model_name" not in text,
        "quick_gelu": config["quick_gelu"],
        "heads of 64 channels": vision["head_width"] == HEAD_WIDTH and text.get("heads") == heads,
        "an MLP of four times the width": vision["mlp_ratio"] == 4 and text.get("mlp_ratio") == 4,
        "LayerNorm's usual epsilon": {vision["norm_kwargs"]["eps"], text["norm_kwargs"]["eps"]} == {1e-5}
        if "norm_kwargs" in text
        else True,
        "no logit_bias": "init_logit_bias" not in config,
        "the end of captions as its highest token, as OpenAI's tokenizer": text.get("pool_type") == "argmax" or last,
        "OpenAI's mean and deviation of pictures": (settings.mean, settings.std) == (usual.mean, usual.std),
    }
    if problem := next((need for need, given in wrong.items() if not given), None):
        raise UsageError(f"--to openai: OpenAI's program takes for granted {problem}; --to open_clip keeps the model")
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(names.to_open_clip(model), folder / FILE)
    return f'clip.load("{folder / FILE}"), open_clip.load_openai_model("{folder / FILE}")'


def read(file: Path, activation: str | None) -> Built:
    """A file of OpenAI's, or of open_clip's training; its configuration follows from the shapes.

    Args:
        activation: "quick_gelu" or "gelu", which shapes do not tell.

    Raises:
        UsageError: not such a file, or `activation` is missing.
    """
    state = read_tensors(file)
    if activation is None:
        raise UsageError(
            f"{file}: weights alone do not tell the activation: add --activation quick_gelu (OpenAI's weights, and "
            "open_clip's models whose name ends so) or gelu (open_clip's others)"
        )
    try:
        vision, text, dim = _shapes(state)
    except (KeyError, IndexError, ValueError) as error:
        raise UsageError(
            f"{file}: not a Vision Transformer under OpenAI's names ({error}); give such a file, or "
            f"a folder of open_clip with {open_clip_folder.CONFIG}"
        ) from None
    tokenizer = openai_tokenizer()
    if text["vocab_size"] != len(tokenizer):
        raise UsageError(
            f"{file}: {text['vocab_size']} tokens; OpenAI's tokenizer, which it needs, has {len(tokenizer)}"
        )
    vision_config = open_clip_folder.vision_config_of(vision, activation, dim)
    text_config = open_clip_folder.text_config_of(text, activation, dim, tokenizer)
    model = CLIPModel(CLIPConfig(text_config=text_config, vision_config=vision_config, projection_dim=dim))
    if "logit_bias" in state:
        loading.add_logit_bias(model, float(state["logit_bias"]))
    names.load_open_clip(model, state, str(file))
    return model, tokenizer, ImageSettings(vision["image_size"])


def _shapes(state: dict[str, Tensor]) -> tuple[dict[str, Any], dict[str, Any], int]:
    """open_clip's `vision_cfg`, `text_cfg` and the dimension of the features."""
    width, _, patch, _ = state["visual.conv1.weight"].shape
    side = round((len(state["visual.positional_embedding"]) - 1) ** 0.5)
    if len(state["visual.positional_embedding"]) != side**2 + 1:
        raise ValueError("its positions are of no square picture")
    vision = {"width": width, "patch_size": patch, "image_size": patch * side, "head_width": HEAD_WIDTH}
    length, text_width = state["positional_embedding"].shape
    text = {"width": text_width, "context_length": length, "vocab_size": len(state["token_embedding.weight"])}
    text["heads"] = text_width // HEAD_WIDTH
    if width % HEAD_WIDTH or text_width % HEAD_WIDTH:
        raise ValueError(f"widths of {width} and {text_width} are not of heads of {HEAD_WIDTH} channels")
    for part, prefix in ((vision, "visual."), (text, "")):
        hidden = state[f"{prefix}transformer.resblocks.0.mlp.c_fc.weight"]  # [4 C, C]
        part["mlp_ratio"] = hidden.shape[0] / hidden.shape[1]
        part["layers"] = len([n for n in state if n.startswith(prefix) and n.endswith(".attn.in_proj_weight")])
    text["layers"] -= vision["layers"]
    return vision, text, state["text_projection"].shape[1]
