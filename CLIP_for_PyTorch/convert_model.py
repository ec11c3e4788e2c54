#!/usr/bin/env python3
"""Writes a model for another program, and reads one of open_clip's or OpenAI's for run_clip.py.

python convert_model.py --model_name_or_path output --to open_clip --output_dir for_open_clip
python convert_model.py --model_name_or_path open_clip_folder --to transformers --output_dir start
python convert_model.py --model_name_or_path weights.pt --activation quick_gelu --to transformers --output_dir start
"""

from __future__ import annotations

import common.requirements

import argparse
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from clip_pretraining.data.tokenization import load_tokenizer
from clip_pretraining.exchange import onnx_towers, open_clip_folder, openai_file, transformers_folder
from clip_pretraining.model import loading
from clip_pretraining.model.construction import Built
from common.errors import UsageError, print_usage_errors
from common.run.folder_lock import Lock

WRITERS = {
    "transformers": transformers_folder.write,
    "vision": transformers_folder.write_vision,
    "open_clip": open_clip_folder.write,
    "openai": openai_file.write,
    "onnx": onnx_towers.write,
}


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "--model_name_or_path",
        required=True,
        help="what run_clip.py trained, a hub name of transformers, a folder of open_clip's, or a file under OpenAI's "
        "names",
    )
    parser.add_argument(
        "--to",
        choices=list(WRITERS),
        required=True,
        help="transformers: a folder that run_clip.py trains, too; vision: its CLIPVisionModelWithProjection alone; "
        "open_clip: a folder; openai: clip.pt; onnx: vision.onnx and text.onnx",
    )
    parser.add_argument("--output_dir", required=True, type=Path, help="a new or empty folder")
    parser.add_argument("--activation", choices=["quick_gelu", "gelu"], help="of a file, which does not tell it")
    return parser.parse_args(argv)


@print_usage_errors
def main(argv: list[str] | None = None) -> None:
    options = parse(argv)
    folder = options.output_dir
    _check_new(folder)
    model, tokenizer, settings = read(options.model_name_or_path, options.activation)
    lock = Lock(folder.absolute().with_name(f".{folder.name}.lock"), f"--output_dir {folder}")
    try:
        _check_new(folder)  # again: reading took its time
        loads = _write(WRITERS[options.to], model.eval(), tokenizer, settings, folder)
    finally:
        lock.release()
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{folder}: {model.config.model_type}, {parameters / 1e6:.1f} M parameters, {settings.size} pixels")
    print(f"load it with {loads}")


def _check_new(folder: Path) -> None:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(f"--output_dir {folder} is not empty: choose another")


def _write(writer: Callable[..., str], model: PreTrainedModel, tokenizer: Any, settings: Any, folder: Path) -> str:
    """How to load what was written; where that fails no half of a model stays."""
    try:
        return writer(model, tokenizer, settings, folder)
    except BaseException as error:
        if folder.is_dir():
            shutil.rmtree(folder, ignore_errors=True)
        if isinstance(error, OSError):
            raise UsageError(f"--output_dir {folder}: {error.strerror or error}") from None
        raise


def read(source: str, activation: str | None) -> Built:
    """Whatever holds a model: a file, a folder of open_clip's, or what `transformers` knows."""
    path = Path(source)
    if path.is_file():
        return openai_file.read(path, activation)
    if activation:
        raise UsageError("--activation is of a file of weights alone; a folder's configuration tells it")
    if (path / open_clip_folder.CONFIG).is_file():
        return open_clip_folder.read(path)
    model = loading.load_model(source, siglip=loading.stored_logit_bias(source) is not None)
    try:
        tokenizer = load_tokenizer(source)
    except (OSError, ValueError, KeyError) as error:
        raise UsageError(
            f"{source}: no tokenizer that can be read ({loading.first_line(error)}): copy it into the folder"
        ) from None
    return model, tokenizer, loading.image_settings(source, model.config)


if __name__ == "__main__":
    main()
