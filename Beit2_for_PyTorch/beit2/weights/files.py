"""Reads weights from a path or a URL, whatever wrapping their writer used. Nothing here runs code from a file."""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import shutil
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from common import checkpoint_file
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
    """A whole checkpoint file of ours or of the reference.

    Raises:
        UsageError: missing, damaged, or not a dictionary.
    """
    try:
        checkpoint = checkpoint_file.load(path, allow=NUMPY_SCALARS)
    except CheckpointError as error:
        if "TorchScript" in str(error):  # OpenAI publishes CLIP in this form
            raise UsageError(
                f"{path}: a TorchScript archive, which is code and not weights: give the same model as a folder of "
                "transformers, or a file of its state_dict"
            ) from error
        raise UsageError(str(error)) from error
    if not isinstance(checkpoint, dict):
        raise UsageError(f"{path}: holds a {type(checkpoint).__name__}, not a checkpoint dictionary")
    return checkpoint


def saved_options(path: Path | None) -> argparse.Namespace | None:
    """The options that a training script kept in its checkpoint; None in any other weight file."""
    if path is None or path.is_dir() or path.suffix == ".safetensors":
        return None
    return read_checkpoint(path).get("args")


def read_state_dict(path: str | Path, keys: tuple[str, ...] = _WRAPPERS) -> dict[str, Tensor]:
    """The tensors of a weight file by name: `.safetensors`, a torch file, or a folder with one of them.

    Args:
        path: file or folder.
        keys: wrappers to look into, in order; the first that is there counts, else the file itself.

    Raises:
        UsageError: no such file, or no tensors in it.
    """
    path = Path(path)
    if path.is_dir():
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


def local_file(location: str) -> Path:
    """A path as it is; an http(s) URL as a file in torch's hub cache, downloaded when needed.

    A name ending in `-<hash>.pth` (8 or more hex digits, as the reference's weights) must match the file's SHA-256.

    Raises:
        UsageError: unreachable, or the hash differs. The message has the command to fetch it by hand.
    """
    if not location.startswith(("http://", "https://")):
        path = Path(location)
        if not path.exists():
            raise UsageError(f"{location}: no such weight file")
        return path
    name = Path(urllib.parse.urlparse(location).path).name
    target = Path(torch.hub.get_dir()) / "checkpoints" / name
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(f"{name}.{os.getpid()}.part")
        try:
            with urllib.request.urlopen(location, timeout=60) as response, open(partial, "wb") as file:
                shutil.copyfileobj(response, file)
            check_hash(partial, name)
            partial.replace(target)
        except (urllib.error.URLError, OSError) as error:
            raise UsageError(f"cannot download: {error}. Fetch it by hand:  wget -O {name} '{location}'") from error
        finally:
            partial.unlink(missing_ok=True)
    return target


def check_hash(path: Path, name: str) -> None:
    """Compares a file with the hash in its name; nothing to do when there is none.

    Raises:
        UsageError: they differ.
    """
    stated = re.search(r"-([0-9a-f]{8,64})\.\w+$", name)
    if stated is None:
        return
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    if not digest.hexdigest().startswith(stated.group(1)):
        raise UsageError(
            f"{name}: its SHA-256 starts with {digest.hexdigest()[:8]}, its name says {stated.group(1)}: "
            "the download is damaged or not the published file"
        )
