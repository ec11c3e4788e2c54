"""Folders of open_clip's (`local-dir:FOLDER`), written and read: weights, configuration, preprocessing, tokenizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from safetensors.torch import save_file
from transformers import (
    AutoConfig,
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPVisionConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    VisionTextDualEncoderConfig,
    VisionTextDualEncoderModel,
)

from clip_pretraining.data.tokenization import load_tokenizer, openai_tokenizer
from clip_pretraining.exchange import names
from clip_pretraining.exchange.tensor_file import read_tensors
from clip_pretraining.model import loading
from clip_pretraining.model.construction import Built
from clip_pretraining.model.loading import ImageSettings
from common.errors import UsageError
from common.run.new_file import readable

CONFIG, WEIGHTS = "open_clip_config.json", "open_clip_model.safetensors"
_OTHER_WEIGHTS = ("model.safetensors", "open_clip_pytorch_model.bin")
_ACTIVATIONS = {True: "quick_gelu", False: "gelu"}  # of open_clip's `quick_gelu`
_ARGMAX = 2  # the end's id for which transformers pools at the highest id, as open_clip by default
# keys of open_clip's configurations that we follow; of others only the value that changes nothing
_VISION = {"layers", "width", "head_width", "mlp_ratio", "patch_size", "image_size", "norm_kwargs"}
_TEXT = {"layers", "width", "heads", "mlp_ratio", "context_length", "vocab_size", "pool_type", "eos_id", "norm_kwargs"}
_TEXT |= {"hf_tokenizer_name", "hf_model_name", "hf_proj_type", "hf_pooler_type"}
_NO_MATTER = {"patch_dropout", "attn_pooler_queries", "attn_pooler_heads", "pad_id", "hf_model_pretrained", "dropout"}
_USUAL = {"pool_type": "tok", "pos_embed_type": "learnable", "proj_type": "linear"}


def write(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, settings: ImageSettings, folder: Path) -> str:
    """A folder for `open_clip.create_model_from_pretrained("local-dir:FOLDER")` and `get_tokenizer`; how to load it.

    Raises:
        UsageError: open_clip has no such model.
    """
    model_cfg = model_config(model, folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(names.to_open_clip(model), folder / WEIGHTS, metadata={"format": "pt"})
    readable(folder)
    tokenizer.save_pretrained(folder)
    if "hf_model_name" in model_cfg["text_cfg"]:
        model.config.text_config.save_pretrained(folder)
    prepared = {"mean": list(settings.mean), "std": list(settings.std), "interpolation": "bicubic"}
    content = {"model_cfg": model_cfg, "preprocess_cfg": {**prepared, "resize_mode": "shortest"}}
    (folder / CONFIG).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return (
        f'open_clip.create_model_from_pretrained("local-dir:{folder}"), open_clip.get_tokenizer("local-dir:{folder}")'
    )


def model_config(model: PreTrainedModel, folder: Path) -> dict[str, Any]:
    """open_clip's `model_cfg`. Of RoBERTa it names the folder, where its configuration lies."""
    vision, text = clip_vision_config(model), model.config.text_config
    acts = {vision.hidden_act, text.hidden_act if text.model_type == "clip_text_model" else vision.hidden_act}
    if len(acts) != 1 or not acts <= set(_ACTIVATIONS.values()):
        raise UsageError(f"open_clip has no CLIP with the activations {', '.join(sorted(acts))}")
    content: dict[str, Any] = {
        "embed_dim": model.config.projection_dim,
        "quick_gelu": vision.hidden_act == "quick_gelu",
        "vision_cfg": {
            "image_size": vision.image_size,
            "layers": vision.num_hidden_layers,
            "width": vision.hidden_size,
            "head_width": vision.hidden_size // vision.num_attention_heads,
            "patch_size": vision.patch_size,
            "mlp_ratio": vision.intermediate_size / vision.hidden_size,
            "norm_kwargs": {"eps": vision.layer_norm_eps},
        },
        "text_cfg": {
            "context_length": loading.max_caption_tokens(model.config),
            "vocab_size": text.vocab_size,
            "hf_tokenizer_name": str(folder.absolute()),
        },
    }
    if getattr(model, "logit_bias", None) is not None:
        content["init_logit_bias"] = model.logit_bias.item()
    if text.model_type == "clip_text_model":
        content["text_cfg"] |= {
            "width": text.hidden_size,
            "heads": text.num_attention_heads,
            "layers": text.num_hidden_layers,
            "mlp_ratio": text.intermediate_size / text.hidden_size,
            "norm_kwargs": {"eps": text.layer_norm_eps},
            "pool_type": "argmax" if text.eos_token_id == _ARGMAX else "eos",
            "eos_id": text.eos_token_id,
        }
    elif text.model_type == "roberta":
        hub = {"hf_model_name": str(folder.absolute()), "hf_model_pretrained": False}
        content["text_cfg"] |= hub | {"hf_proj_type": "linear", "hf_pooler_type": "cls_pooler"}
    else:
        raise UsageError(f"only the text towers of CLIP and RoBERTa are known here, this is a {text.model_type!r}")
    return content


def clip_vision_config(model: PreTrainedModel) -> CLIPVisionConfig:
    """The vision tower's configuration. UsageError for a tower that is not CLIP's."""
    config = model.config.vision_config
    if not isinstance(config, CLIPVisionConfig):
        raise UsageError(f"only CLIP vision towers are known to others, this is a {config.model_type!r}")
    return config


def read(folder: Path) -> Built:
    """A folder of open_clip's as a model, tokenizer and preprocessing.

    Raises:
        UsageError: a part is missing, or the model or its preprocessing is none that we have.
    """
    content = _read_config(folder)
    tokenizer = _tokenizer(folder, content["model_cfg"]["text_cfg"])
    model = _build(folder, content["model_cfg"], tokenizer)
    weights = next((folder / n for n in (WEIGHTS, *_OTHER_WEIGHTS) if (folder / n).is_file()), None)
    if weights is None:
        raise UsageError(f"{folder}: no weights ({WEIGHTS}) beside {CONFIG}: fetch them, too")
    names.load_open_clip(model, read_tensors(weights), str(weights))
    prepared = content.get("preprocess_cfg", {})
    for key, ours in (("interpolation", "bicubic"), ("resize_mode", "shortest")):
        if prepared.get(key, ours) != ours:
            raise UsageError(f"{folder / CONFIG}: pictures with {key} {prepared[key]!r}; here it is {ours}")
    usual = ImageSettings(model.config.vision_config.image_size)
    colours = [tuple(prepared.get(key) or ours) for key, ours in (("mean", usual.mean), ("std", usual.std))]
    if not all(len(values) == 3 and all(isinstance(v, int | float) for v in values) for values in colours):
        raise UsageError(f"{folder / CONFIG}: mean and std must be three numbers each, not {colours}")
    return model, tokenizer, ImageSettings(usual.size, *colours)


def _read_config(folder: Path) -> dict[str, Any]:
    try:
        content = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        vision, text = content["model_cfg"]["vision_cfg"], content["model_cfg"]["text_cfg"]
        content["model_cfg"]["embed_dim"] + 0
        for part in (vision, text, content.setdefault("preprocess_cfg", {})):
            part.keys()
    except OSError as error:
        raise UsageError(f"{folder / CONFIG}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"{folder / CONFIG}: not a configuration of open_clip's ({error!r}); fetch it anew") from None
    for part, known in (("vision_cfg", (vision, _VISION)), ("text_cfg", (text, _TEXT))):
        values, ours = known
        if "timm_model_name" in values:
            raise UsageError(
                f"{folder / CONFIG}: a tower of timm's ({values['timm_model_name']}); here are only CLIP's"
            )
        for key, value in values.items():
            if key not in ours | _NO_MATTER and value and value != _USUAL.get(key):
                raise UsageError(
                    f"{folder / CONFIG}: {part} has {key} = {value!r}, which our towers lack: choose another"
                )
    return content


def _tokenizer(folder: Path, text: dict[str, Any]) -> PreTrainedTokenizerBase:
    if not text.get("hf_tokenizer_name"):
        return openai_tokenizer()
    try:
        return load_tokenizer(str(folder))
    except (OSError, ValueError, KeyError) as error:
        raise UsageError(
            f"{folder}: no tokenizer that can be read ({loading.first_line(error)}): copy it into the folder"
        ) from None


def _build(folder: Path, content: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """With random weights."""
    vision, text, dim = content["vision_cfg"], content["text_cfg"], content["embed_dim"]
    try:
        activation = _ACTIVATIONS[content.get("quick_gelu", False)]
        vision_config = vision_config_of(vision, activation, dim)
        if "hf_model_name" in text:
            family, config = (
                VisionTextDualEncoderModel,
                VisionTextDualEncoderConfig.from_vision_text_configs(
                    vision_config, _hugging_face_config(folder, text), projection_dim=dim
                ),
            )
        else:
            text_config = text_config_of(text, activation, dim, tokenizer)
            family, config = (
                CLIPModel,
                CLIPConfig(text_config=text_config, vision_config=vision_config, projection_dim=dim),
            )
        model = family(config)
        if content.get("init_logit_bias") is not None:
            loading.add_logit_bias(model, float(content["init_logit_bias"]))
    except (ValueError, TypeError, KeyError, RuntimeError, ZeroDivisionError, StrictDataclassError) as error:
        reason = loading.first_line(error.__cause__ or error)
        raise UsageError(f"{folder / CONFIG}: {reason}: no model of ours; give another folder") from None
    return model


def vision_config_of(vision: dict[str, Any], activation: str, dim: int) -> CLIPVisionConfig:
    """From open_clip's `vision_cfg`."""
    width, size = vision.get("width", 768), vision.get("image_size", 224)
    if not isinstance(vision.get("layers", 12), int):
        raise ValueError("a ResNet tower; here are only Vision Transformers")
    return CLIPVisionConfig(
        hidden_size=width,
        num_hidden_layers=vision.get("layers", 12),
        num_attention_heads=width // vision.get("head_width", 64),
        intermediate_size=int(width * vision.get("mlp_ratio", 4.0)),
        patch_size=vision.get("patch_size", 16),
        image_size=size if isinstance(size, int) else _square(size),
        hidden_act=activation,
        layer_norm_eps=(vision.get("norm_kwargs") or {}).get("eps", 1e-5),
        projection_dim=dim,
    )


def _square(size: list[int]) -> int:
    if len(set(size)) != 1:
        raise ValueError(f"pictures of {size}; here they are square")
    return size[0]


def text_config_of(
    text: dict[str, Any], activation: str, dim: int, tokenizer: PreTrainedTokenizerBase
) -> CLIPTextConfig:
    """From open_clip's `text_cfg`."""
    width, pool = text.get("width", 512), text.get("pool_type", "argmax")
    if pool not in ("argmax", "eos"):
        raise ValueError(f"text_cfg has pool_type = {pool!r}; here it is argmax or eos")
    return CLIPTextConfig(
        hidden_size=width,
        num_hidden_layers=text.get("layers", 12),
        num_attention_heads=text.get("heads", 8),
        intermediate_size=int(width * text.get("mlp_ratio", 4.0)),
        max_position_embeddings=text.get("context_length", 77),
        vocab_size=text.get("vocab_size", 49408),
        hidden_act=activation,
        layer_norm_eps=(text.get("norm_kwargs") or {}).get("eps", 1e-5),
        projection_dim=dim,
        bos_token_id=tokenizer.bos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=_ARGMAX if pool == "argmax" else text.get("eos_id", _ARGMAX),
    )


def _hugging_face_config(folder: Path, text: dict[str, Any]) -> PretrainedConfig:
    for key, ours in (("hf_proj_type", "linear"), ("hf_pooler_type", "cls_pooler")):
        if text.get(key) != ours:
            raise ValueError(f"text_cfg has {key} = {text.get(key)!r}; here it is {ours!r}")
    local = (folder / "config.json").is_file()
    try:
        config = AutoConfig.from_pretrained(str(folder) if local else text["hf_model_name"])
    except OSError as error:
        raise ValueError(f"text tower {text['hf_model_name']}: {loading.first_line(error)}") from None
    if config.model_type != "roberta":
        raise ValueError(f"a text tower of the kind {config.model_type!r}; here are CLIP's and RoBERTa")
    return config
