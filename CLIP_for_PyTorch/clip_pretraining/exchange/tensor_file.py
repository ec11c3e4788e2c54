"""Files of tensors by name, of which nothing else is read."""

from __future__ import annotations

import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from clip_pretraining.model.loading import first_line
from common.errors import UsageError


def read_tensors(file: Path) -> dict[str, Tensor]:
    """Tensors by name, of safetensors or of a .pt or .bin, from which nothing but tensors is read.

    Raises:
        UsageError: broken, or a program (TorchScript) instead of weights.
    """
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        if zipfile.is_zipfile(file):
            with zipfile.ZipFile(file) as archive:
                if any(name.endswith("/constants.pkl") for name in archive.namelist()):
                    raise UsageError(
                        f'{file}: a TorchScript program, which is not run here. If you trust it: python -c "import '
                        f"torch; torch.save(torch.jit.load('{file.name}', 'cpu').state_dict(), 'weights.pt')\""
                    )
        content: Any = torch.load(file, map_location="cpu", weights_only=True)
    except (OSError, SafetensorError, RuntimeError, EOFError, ValueError, KeyError, pickle.UnpicklingError) as error:
        raise UsageError(f"{file}: cannot be read as weights: {first_line(error)}") from None
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]  # of open_clip's training
    if not isinstance(content, dict) or not content or not all(isinstance(value, Tensor) for value in content.values()):
        raise UsageError(f"{file}: holds no tensors by name")
    return {str(name).removeprefix("module."): value for name, value in content.items()}
