"""A model as an ONNX file, by torch's exporter."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from common.errors import UsageError

ONE_FILE_BYTES = 2_000_000_000  # protobuf ends at 2 GiB: larger models keep their weights in a file beside it


def write(
    model: nn.Module, inputs: Mapping[str, Tensor], output: str, dims: tuple, told: Mapping[str, Any], path: Path
) -> None:
    """Writes and checks the file.

    Args:
        inputs: examples by name; of no dimension that varies may there be 1, which would be taken for a constant.
        output: name of the only result.
        dims: of each input, {dimension: torch.export.Dim} of those that vary.
        told: the file's metadata, each entry as JSON.

    Raises:
        UsageError: onnx or onnxscript is not installed.
    """
    try:
        import onnx
        import onnxscript  # noqa: F401  (torch's exporter needs it)
    except ImportError as error:
        raise UsageError(f"--to onnx: {error}: pip install onnx onnxscript -c ../constraints.txt") from None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, of its tree code and of axes that two inputs share
        program = torch.onnx.export(
            model.eval(),
            tuple(inputs.values()),
            input_names=list(inputs),
            output_names=[output],
            dynamic_shapes=dims,
            verbose=False,
        )
    program.model.metadata_props.update({key: json.dumps(value, ensure_ascii=False) for key, value in told.items()})
    weights = (value.const_value for value in program.model.graph.initializers.values())
    large = sum(tensor.nbytes for tensor in weights) > ONE_FILE_BYTES
    program.save(path, external_data=large)
    onnx.checker.check_model(str(path))
