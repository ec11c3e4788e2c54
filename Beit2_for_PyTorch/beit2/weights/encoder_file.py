"""An encoder's weights from whatever holds them: our checkpoints, the reference's, exports of timm and transformers."""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from beit2.weights.download import local_file
from beit2.weights.files import read_checkpoint, read_state_dict, saved_options
from beit2.weights.transformers_names import from_transformers
from common.errors import UsageError

Triple = tuple[float, float, float]
_TRANSFORMERS = ("BeitModel", "BeitForImageClassification", "BeitForMaskedImageModeling")


@dataclass(frozen=True)
class EncoderFile:
    """What a file or folder says of an encoder.

    Attributes:
        state: its tensors under our names.
        mean_std: of the pictures that it was trained on; None where nothing says it.
        heads: attention heads, None where nothing says it.
        options: of the training that wrote it, None in files of others.
    """

    state: dict[str, Tensor]
    mean_std: tuple[Triple, Triple] | None = None
    heads: int | None = None
    options: argparse.Namespace | None = None


def read_encoder(location: str, average: bool = False) -> EncoderFile:
    """The weights at a path, an address or a published name.

    Args:
        average: of the weights (fine-tuning with --model_ema) instead of the weights.

    Raises:
        UsageError: no such file, not readable, a tokenizer's, or without an average that was asked for.
    """
    path = local_file(location)
    config = _config(path)
    found = _of_library(path, config) if config else _of_checkpoint(path, average)
    if average and config:
        raise UsageError(f"{path}: holds no weight average; leave out --model_ema")
    if "quantize.embedding.weight" in found.state:
        raise UsageError(f"{path}: the weights of a tokenizer, not of an encoder; print_tokens.py takes it")
    return found


def _config(folder: Path) -> dict[str, Any]:
    """What an exported model's folder says of it; nothing for any other path."""
    file = folder / "config.json"
    if not file.is_file():
        return {}
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UsageError(f"{file}: not readable ({error})") from error
    return config if isinstance(config, dict) else {}


def _of_library(folder: Path, config: dict[str, Any]) -> EncoderFile:
    if config.get("model_type") == "beit":
        return _of_transformers(folder, config)
    pictures, arguments = config.get("pretrained_cfg") or {}, config.get("model_args") or {}
    return EncoderFile(read_state_dict(folder), _pair(pictures, "mean", "std"), arguments.get("num_heads"))


def _of_transformers(folder: Path, config: dict[str, Any]) -> EncoderFile:
    """Loaded by the library itself, which knows the names of all its versions."""
    kind = next(iter(config.get("architectures") or ()), _TRANSFORMERS[0])
    if kind not in _TRANSFORMERS:
        raise UsageError(f"{folder}: a {kind}; there are names for {', '.join(_TRANSFORMERS)}")
    try:
        import transformers
    except ImportError as error:
        raise UsageError(f"{folder}: is transformers' format: pip install transformers") from error
    try:
        model = getattr(transformers, kind).from_pretrained(folder, local_files_only=True, use_safetensors=True)
        state = from_transformers(model.state_dict())
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise UsageError(f"{folder}: must be a folder that transformers loads as {kind} ({error})") from error
    file = folder / "preprocessor_config.json"
    pictures = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return EncoderFile(state, _pair(pictures, "image_mean", "image_std"), config.get("num_attention_heads"))


def _pair(values: dict[str, Any], mean: str, std: str) -> tuple[Triple, Triple] | None:
    return (tuple(values[mean]), tuple(values[std])) if mean in values and std in values else None


def _of_checkpoint(path: Path, average: bool) -> EncoderFile:
    trained = saved_options(path)
    if average:
        checkpoint = {} if path.suffix == ".safetensors" else read_checkpoint(path)
        averaged = checkpoint["model"] if checkpoint.get("averaged") else checkpoint.get("model_ema")
        if averaged is None:
            raise UsageError(f"{path}: has no weight average; leave out --model_ema")
        return EncoderFile(averaged, options=trained)
    return EncoderFile(read_state_dict(path), options=trained)
