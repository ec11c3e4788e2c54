"""The two model families, from `transformers`: loading, towers frozen, SigLIP's bias, features.

`VisionTextDualEncoderModel` is the reference's (CLIP-ViT + RoBERTa), `CLIPModel` is OpenAI's own. Both name their parts
alike (vision_model, text_model, visual_projection, text_projection, logit_scale), so nothing else asks which one it is.
"""

from __future__ import annotations

import contextlib
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    CLIPModel,
    PretrainedConfig,
    PreTrainedModel,
    VisionTextDualEncoderModel,
)

from common import distributed
from common.errors import UsageError

FAMILIES = {"vision-text-dual-encoder": VisionTextDualEncoderModel, "clip": CLIPModel}
AVERAGE_FILE = "average.safetensors"  # of the weights, in a checkpoint of a run with --ema_decay
SIGLIP_INITIAL = {"logit_scale": 2.302585, "logit_bias": -10.0}  # ln 10 and -10: arXiv:2303.15343, section 3.1


@dataclass(frozen=True)
class ImageSettings:
    """What the model wants to see: side of the square, and mean and standard deviation of each channel in 0..1."""

    size: int
    mean: tuple[float, ...] = (0.48145466, 0.4578275, 0.40821073)
    std: tuple[float, ...] = (0.26862954, 0.26130258, 0.27577711)


def load_model(
    name_or_path: str | None, config_name: str | None = None, siglip: bool = False, **hub_kwargs
) -> PreTrainedModel:
    """A model from a folder or hub name, or with random weights from the configuration `config_name` alone.

    Args:
        siglip: give the model a `logit_bias` (taken from the weights where they have one).
        hub_kwargs: cache_dir, revision, token.

    Raises:
        UsageError: no such model, another kind of model, or weights that do not fit the configuration.
    """
    source = config_name or name_or_path
    if source is None:
        raise UsageError("give --model_name_or_path (a folder or hub name), or --config_name to train from scratch")
    if (Path(source) / "open_clip_config.json").is_file():
        raise UsageError(
            f"{source}: a folder of open_clip's: convert_model.py --model_name_or_path {source} --to transformers "
            "makes one to give here"
        )
    try:
        config = AutoConfig.from_pretrained(source, **hub_kwargs)
    except (OSError, ValueError) as error:
        raise UsageError(
            f"{source}: not a model folder or hub name that can be read ({first_line(error)}). "
            "save_clip_roberta.py builds one; it holds a config.json and the weights"
        ) from None
    family = FAMILIES.get(config.model_type)
    if family is None:
        raise UsageError(
            f"{source}: a {config.model_type!r} model; needed is one of {', '.join(FAMILIES)}. "
            "save_clip_roberta.py joins a vision and a text model into one"
        )
    if name_or_path is not None and (Path(name_or_path) / AVERAGE_FILE).is_file() and distributed.rank() == 0:
        print(
            f"note: {name_or_path} is a training's checkpoint: its last weights are taken, not their average "
            "(--ema_decay), which that run evaluated and saves in its own folder and in best/"
        )
    model = family(config) if name_or_path is None else _load_weights(family, name_or_path, config, hub_kwargs)
    # transformers leaves it out for the dual encoder, whose towers can
    towers = (model.vision_model, model.text_model)
    model.supports_gradient_checkpointing = all(tower.supports_gradient_checkpointing for tower in towers)
    if siglip:
        _attach_logit_bias(model, name_or_path)
    return model


def _load_weights(family, name_or_path: str, config: PretrainedConfig, hub_kwargs: dict) -> PreTrainedModel:
    try:
        # float32 masters whatever dtype the folder holds: precision is autocast's business
        model, info = family.from_pretrained(
            name_or_path,
            config=config,
            dtype=torch.float32,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # told below, in one line
            **hub_kwargs,
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise UsageError(f"{name_or_path}: the weights cannot be loaded: {first_line(error)}") from None
    for name, stored, wanted in sorted(info["mismatched_keys"])[:1]:
        raise UsageError(
            f"{name_or_path}: {name} is {list(stored)} in the weights and {list(wanted)} by config.json: they are of "
            "different models, fetch both anew"
        )
    missing = sorted(info["missing_keys"])
    if any(".lora_" in name for name in info["unexpected_keys"]):
        raise UsageError(
            f"{name_or_path}: a checkpoint of --lora_rank; give the folder of the run that wrote it, "
            "where the weights are merged"
        )
    if missing:
        raise UsageError(
            f"{name_or_path}: the weights lack {len(missing)} of the model's tensors ({', '.join(missing[:3])} ...): "
            "config.json and the weights are of different models, fetch both anew"
        )
    return model


def _attach_logit_bias(model: PreTrainedModel, name_or_path: str | None) -> None:
    """SigLIP's bias; a model that has none yet gets SigLIP's initial scale with it."""
    stored = stored_logit_bias(name_or_path)
    if stored is None:
        model.logit_scale.data.fill_(SIGLIP_INITIAL["logit_scale"])
    add_logit_bias(model, SIGLIP_INITIAL["logit_bias"] if stored is None else stored)


def add_logit_bias(model: PreTrainedModel, value: float) -> None:
    """Gives a model SigLIP's bias as a parameter."""
    model.logit_bias = nn.Parameter(torch.tensor(value))


def stored_logit_bias(name_or_path: str | None) -> float | None:
    """The bias in a folder's weights, None where there is none."""
    weights = Path(name_or_path or "") / "model.safetensors"
    if name_or_path and weights.is_file():
        with safe_open(weights, "pt") as file:
            if "logit_bias" in file.keys():
                return float(file.get_tensor("logit_bias"))
    return None


def image_settings(name_or_path: str | None, config: PretrainedConfig, **hub_kwargs) -> ImageSettings:
    """Mean and deviation from the folder's image processor, the size from the vision tower it feeds."""
    size = config.vision_config.image_size
    folder = Path(name_or_path or "")
    for name in ("processor_config.json", "preprocessor_config.json"):  # transformers 5, transformers 4
        if name_or_path and (folder / name).is_file():
            try:
                values = json.loads((folder / name).read_text(encoding="utf-8"))
            except ValueError as error:
                raise UsageError(f"{folder / name}: not valid JSON ({error})") from None
            if not isinstance(values, dict):
                raise UsageError(f"{folder / name}: not an image processor's settings, take those of the model")
            values = values.get("image_processor", values)
            if "image_mean" in values and "image_std" in values:
                return ImageSettings(size, tuple(values["image_mean"]), tuple(values["image_std"]))
    if name_or_path and not folder.is_dir():
        with contextlib.suppress(OSError, ValueError):  # a hub model without an image processor: CLIP's constants
            processor = AutoImageProcessor.from_pretrained(name_or_path, **hub_kwargs)
            return ImageSettings(size, tuple(processor.image_mean), tuple(processor.image_std))
    return ImageSettings(size)


def max_caption_tokens(config: PretrainedConfig) -> int:
    """Positions the text tower has for tokens; RoBERTa's begin after its padding index."""
    text = config.text_config
    reserved = text.pad_token_id + 1 if text.model_type in ("roberta", "xlm-roberta", "camembert") else 0
    return text.max_position_embeddings - reserved


def freeze(model: PreTrainedModel, vision: bool, text: bool) -> None:
    """Takes a tower out of training; its projection stays trainable."""
    for tower, frozen in ((model.vision_model, vision), (model.text_model, text)):
        if frozen:
            tower.requires_grad_(False)


def encode_images(model: PreTrainedModel, pixel_values: torch.Tensor) -> torch.Tensor:
    """L2-normalised image features [B, d] of normalised pixels [B, 3, S, S]."""
    return nn.functional.normalize(model.get_image_features(pixel_values=pixel_values).pooler_output.float(), dim=-1)


def encode_texts(model: PreTrainedModel, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
    """L2-normalised text features [B, d] of token ids [B, L]."""
    output = model.get_text_features(input_ids=input_ids, attention_mask=attention_mask)
    return nn.functional.normalize(output.pooler_output.float(), dim=-1)


def first_line(error: Exception) -> str:
    """The part of a library's error that a user reads."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
