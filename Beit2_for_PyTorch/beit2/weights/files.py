"""Reads weight files, whatever wrapping their writer used. Nothing here runs code from a file."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from common import checkpoint_file, shards
from common.checkpoint_file import CheckpointError
from common.errors import UsageError

# The reference keeps NumPy floats (learning rates) in its optimizer state. These names build numbers, nothing else.
NUMPY_SCALARS = (
    (np._core.multiarray.scalar, "numpy._core.multiarray.scalar"),
    (np._core.multiarray.scalar, "numpy.core.multiarray.scalar"),
    np.dtype,
    np.dtypes.Float64DType,
    np.dtypes.Float32DType,
    np.dtypes.Int64DType,
)

_WRAPPERS = ("model", "module", "state_dict", "teacher", "model_state")


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """A whole checkpoint of ours or of the reference: a file, or a sharded one's folder with its tensors made whole.

    Raises:
        UsageError: missing, damaged, or not a dictionary.
    """
    try:
        if (Path(path) / shards.PROGRESS).is_file():
            return {**shards.load_progress(Path(path)), **shards.read_shards(path)}
        checkpoint = checkpoint_file.load(path, allow=NUMPY_SCALARS)
    except CheckpointError as error:
        if "TorchScript" in str(error):  # OpenAI publishes CLIP in this form
            raise UsageError(
                f"{path}: a TorchScript archive, which is code and not weights: give the same model as a folder of "
                "transformers, or a file of its state_dict"
            ) from error
        raise UsageError(str(error)) from error
    if not isinstance(checkpoint, dict):
        raise UsageError(
            f"{path}: holds a {type(checkpoint).__name__}, not a checkpoint dictionary; give one of a training"
        )
    return checkpoint


def saved_options(path: Path | None) -> argparse.Namespace | None:
    """The options that a training script kept in its checkpoint, or export_weights.py in a safetensors file's header;
    None in any other weight file."""
    if path is not None and path.suffix == ".safetensors":
        return _header_options(path)
    is_checkpoint = path is not None and (path.is_file() or (path / shards.PROGRESS).is_file())
    return read_checkpoint(path).get("args") if is_checkpoint else None


def _header_options(path: Path) -> argparse.Namespace | None:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            about = json.loads((file.metadata() or {}).get("beit2", "null"))
    except (SafetensorError, OSError, ValueError):  # whoever reads its tensors says what is wrong
        return None
    return argparse.Namespace(**about) if isinstance(about, dict) and about else None


def read_state_dict(path: str | Path, keys: tuple[str, ...] = _WRAPPERS) -> dict[str, Tensor]:
    """The tensors of a weight file by name: `.safetensors`, a torch file, a folder with one of them, or a sharded one.

    Args:
        path: file or folder.
        keys: wrappers to look into, in order; the first that is there counts, else the file itself.

    Raises:
        UsageError: no such file, or no tensors in it.
    """
    path = Path(path)
    if path.is_dir() and not (path / shards.PROGRESS).is_file():
        found = [path / name for name in ("model.safetensors", "pytorch_model.bin") if (path / name).exists()]
        if not found:
            raise UsageError(f"{path}: neither model.safetensors nor pytorch_model.bin in this folder")
        path = found[0]
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(path)
        except (SafetensorError, FileNotFoundError) as error:
            raise UsageError(f"{path}: not a readable safetensors file ({error})") from error
    state = read_checkpoint(path)
    for key in keys:
        if isinstance(state.get(key), dict):
            state = state[key]
            break
    state = {name: tensor for name, tensor in state.items() if isinstance(tensor, torch.Tensor)}
    if not state:
        raise UsageError(f"{path}: no tensors in it")
    return state
