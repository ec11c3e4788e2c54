"""Representations of texts or pictures from a pretraining checkpoint, as .npz or .safetensors.

    python extract_features.py checkpoint_best.pt lines.txt features.npz \
        --encoder-json encoder.json --vocab-bpe vocab.bpe --dict dict.txt      # or a table, --column sentence
    python extract_features.py checkpoint_best.pt pictures/ features.safetensors --pool tokens

Under torchrun every rank takes its share of the batches; the first writes.
"""

from __future__ import annotations

import common.requirements

import argparse
import contextlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf

from common import checkpoint_file, distributed
from common import device as devices
from common.checkpoint_file import CheckpointError
from common.distributed import World
from common.errors import UsageError, print_usage_errors
from common.run.new_file import new_file
from data2vec import device_patches
from data2vec.config.keys import options_of
from data2vec.data.bpe import TextEncoding
from data2vec.features import Options, picture_features, text_features, text_rows
from data2vec.weights.pretrained import model_of, text_encoder
from data2vec.weights.vocabulary import check_vocabulary


@print_usage_errors
def main(argv: list[str] | None = None) -> None:
    options = parse(argv)
    with distributed.process_group(options.device) as world:
        devices.require_precision(world.device, options.precision)
        with new_file(options.output) if world.is_main else contextlib.nullcontext() as place:
            try:
                checkpoint = checkpoint_file.load(options.checkpoint)
                model = model_of(checkpoint, options.checkpoint).to(world.device)
            except (CheckpointError, ValueError) as error:
                raise UsageError(str(error)) from None
            device_patches.apply_to_model(model, world.device)
            arrays, note = features(model.eval(), checkpoint, options, world)
            if place:
                write(place, arrays, options.output.suffix)
        if world.is_main:
            shape = next(iter(arrays.values())).shape
            print(f"{options.output}: {len(arrays['names'])} of {options.input}, {list(shape)}{note}", flush=True)
        distributed.barrier()


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path, help="of pretraining")
    parser.add_argument("input", type=Path, help="text: a file of lines, or .csv, .tsv, .jsonl; pictures: a folder")
    parser.add_argument("output", type=Path, help=".npz or .safetensors")
    parser.add_argument("--pool", choices=("mean", "tokens"), default="mean", help="a mean, or all tokens' states")
    parser.add_argument("--teacher", action="store_true", help="text: of the EMA teacher, not the student")
    parser.add_argument("--column", default="sentence", help="of a table")
    parser.add_argument("--encoder-json", type=Path, help="text: bpe_encode.py's file")
    parser.add_argument("--vocab-bpe", type=Path, help="text: the other one")
    parser.add_argument("--dict", type=Path, help="text: dict.txt of the corpus")
    parser.add_argument("--batch_size", type=int, default=32, help="texts or pictures on a device at once")
    parser.add_argument("--device", choices=devices.DEVICES, default="auto")
    parser.add_argument("--precision", choices=devices.PRECISIONS, default="fp32")
    options = parser.parse_args(argv)
    if options.output.suffix not in (".npz", ".safetensors"):
        raise UsageError(f"{options.output}: name a .npz or a .safetensors file")
    if options.output.exists():
        raise UsageError(f"{options.output} exists and is not overwritten")
    if options.batch_size < 1:
        raise UsageError(f"--batch_size {options.batch_size}: must be at least 1")
    return options


def features(
    model: torch.nn.Module, checkpoint: dict[str, Any], options: argparse.Namespace, world: World
) -> tuple[dict[str, np.ndarray], str]:
    """(arrays by name, a word on what was cut)."""
    how = Options(options.pool, options.precision, options.batch_size)
    files = (options.encoder_json, options.vocab_bpe, options.dict)
    if model.picture_size:
        if options.teacher or any(files):
            raise UsageError(f"{options.checkpoint} is of pictures: --teacher and the vocabulary's files are for text")
        if not options.input.is_dir():
            raise UsageError(f"{options.input}: must be a folder of pictures, of which {options.checkpoint} is")
        return picture_features(model, options.input, picture_task(model, checkpoint), world, how), ""
    if not all(files):
        raise UsageError("a text checkpoint needs --encoder-json, --vocab-bpe and --dict, those of its corpus")
    encoding = TextEncoding(*map(str, files))
    encoder = text_encoder(model, options.teacher, options.checkpoint).to(world.device).eval()
    check_vocabulary(encoding.vocab, options.dict, checkpoint, options.checkpoint)
    rows = text_rows(options.input, options.column)
    arrays, cut = text_features(encoder, options.input, rows, encoding, world, how)
    return arrays, f", {cut} cut at {encoder.config.max_source_positions} tokens" if cut else ""


def picture_task(model: torch.nn.Module, checkpoint: dict[str, Any]) -> DictConfig:
    """Size and normalisation of the pictures that the model has seen; a default where the checkpoint does not say."""
    known, options = checkpoint["cfg"].get("task") or {}, options_of("image_pretraining")
    names = ("normalization_mean", "normalization_std")
    task = {name: known.get(name) or options[f"task.{name}"].default for name in names}
    return OmegaConf.create({"task": {"input_size": model.picture_size, **task}})


def write(path: Path, arrays: dict[str, np.ndarray], suffix: str) -> None:
    """The format is the suffix's. In .safetensors the names are JSON in the metadata, since it holds numbers only."""
    if suffix == ".npz":
        with open(path, "wb") as file:
            np.savez(file, **arrays)
        return
    from safetensors.numpy import save_file

    names = json.dumps(arrays["names"].tolist())
    save_file({key: value for key, value in arrays.items() if key != "names"}, path, metadata={"names": names})


if __name__ == "__main__":
    main()
