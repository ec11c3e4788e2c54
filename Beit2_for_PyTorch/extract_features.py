"""Features of pictures from a frozen encoder, for search, k-NN, clustering or a classifier of one's own.

python extract_features.py --checkpoint checkpoint-1599.pth --data_path DIR --output features.npy
python extract_features.py --checkpoint DIR_OF_TIMM --data_path DIR --output features.safetensors --pool cls --layer 9
Under torchrun every rank takes its share of the pictures.
"""

from __future__ import annotations

import common.requirements

import argparse
import contextlib
import json
import os
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Subset

from beit2 import device_patches
from beit2.data.labelled import CentreCrop, LabelledImages
from beit2.data.listing import list_pictures
from beit2.data.normalizer import Normalizer
from beit2.data.picture_list import PictureList
from beit2.data.reading import check_images
from beit2.features import POOLS, block_states, pooled
from beit2.model.from_weights import encoder_from_weights
from beit2.model.names import heads_of
from beit2.model.vision_transformer import VisionTransformer
from beit2.options import mean_and_std
from beit2.weights.encoder_file import EncoderFile, read_encoder
from common import device as devices
from common import distributed
from common.distributed import World, process_group
from common.errors import UsageError, print_usage_errors
from common.run.new_file import new_file, writing
from common.run.progress import bar


@print_usage_errors
def main(argv: list[str] | None = None) -> None:
    options = read_options(argv)
    with process_group(options.device) as world:
        devices.require_precision(world.device, options.precision)
        source = read_encoder(options.checkpoint, options.model_ema)
        encoder = encoder_of(source, options.checkpoint)
        options.layer = which_layer(options.layer, len(encoder.blocks))
        paths = list_pictures(options.data_path, whole=True)
        check_images(paths)
        encoder = encoder.to(world.device)
        device_patches.apply(encoder, None, world.device)
        pictures = LabelledImages(paths, np.zeros(len(paths)), CentreCrop(encoder.patch_embed.img_size[0]))
        normalizer = Normalizer(*statistics(options, source, world), world.device)
        write(options, world, encoder, pictures, normalizer)


def read_options(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("extract_features.py", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--checkpoint", required=True,
        help="of pretraining or fine-tuning, a published name, or a folder that export_weights.py, timm or "
        "transformers wrote",
    )  # fmt: skip
    parser.add_argument("--data_path", required=True, help="folder of pictures, with or without class folders")
    parser.add_argument("--output", type=Path, required=True, help=".npy (names beside it) or .safetensors; a new file")
    parser.add_argument("--pool", choices=POOLS, default="mean", help="of the patches' states, the CLS state, or both")
    parser.add_argument("--layer", type=int, default=-1, help="block, from 1; -1 is the last, -2 the one before")
    parser.add_argument("--model_ema", action="store_true", help="the weight average instead of the weights")
    parser.add_argument("--imagenet_default_mean_and_std", action="store_true", help="where the weights do not say it")
    parser.add_argument("--batch_size", type=int, default=64, help="per device")
    parser.add_argument("--device", default="auto", help="auto, npu, cuda or cpu")
    parser.add_argument("--precision", choices=devices.PRECISIONS, default="fp32")
    parser.add_argument("--num_workers", type=int, default=min(10, devices.available_cores()))
    options = parser.parse_args(argv)
    if options.output.suffix not in (".npy", ".safetensors"):
        raise UsageError(f"--output {options.output}: name a .npy or a .safetensors file")
    for file in (options.output, *([names_of(options.output)] if options.output.suffix == ".npy" else [])):
        if file.exists():
            raise UsageError(f"--output {options.output}: {file} exists, and is not overwritten")
    if options.batch_size < 1 or options.num_workers < 0:
        raise UsageError("--batch_size must be at least 1 and --num_workers not negative")
    return options


def names_of(output: Path) -> Path:
    """The file of the pictures' names that lies beside an .npy."""
    return output.with_suffix(".names.txt")


def encoder_of(source: EncoderFile, where: str) -> VisionTransformer:
    """Frozen, in evaluation mode."""
    try:
        return encoder_from_weights(source.state, source.heads or heads_of(source.options)).requires_grad_(False)
    except UsageError as error:
        raise UsageError(f"--checkpoint {where}: {error.message}") from error


def which_layer(layer: int, depth: int) -> int:
    """The block's number, from 1."""
    if not (1 <= layer <= depth or -depth <= layer <= -1):
        raise UsageError(f"--layer {layer}: choose a block from 1 to {depth} (or -1, the last, to -{depth})")
    return layer if layer > 0 else depth + 1 + layer


def statistics(options: argparse.Namespace, source: EncoderFile, world: World) -> tuple[tuple, tuple]:
    """Mean and deviation of the pictures that the encoder was trained on."""
    if source.mean_std is not None:
        return source.mean_std
    if hasattr(source.options, "imagenet_default_mean_and_std"):
        return mean_and_std(source.options)
    if world.is_main and not options.imagenet_default_mean_and_std:
        print("note: the weights do not say how their pictures were normalised: mean and deviation 0.5 "
              "(--imagenet_default_mean_and_std for ImageNet's)", flush=True)  # fmt: skip
    return mean_and_std(options)


def write(
    options: argparse.Namespace, world: World, encoder: VisionTransformer, pictures: LabelledImages, normalizer
) -> None:
    """The features float32 [pictures, C] in the order of the names, whole or not at all."""
    shape = (len(pictures), encoder.embed_dim * len(options.pool.split("_")))
    with new_file(options.output) if world.is_main else contextlib.nullcontext():
        rows = open_rows(options.output, shape, world)
        share = range(len(pictures) * world.rank // world.size, len(pictures) * (world.rank + 1) // world.size)
        loader = DataLoader(Subset(pictures, share), options.batch_size, num_workers=options.num_workers)
        at = share.start
        with torch.no_grad(), devices.autocast(world.device, options.precision):
            for batch, _ in bar(loader, "features"):
                states = block_states(encoder, normalizer(normalizer.unit(batch)), options.layer)
                rows[at : at + len(batch)] = pooled(encoder, states, options.layer, options.pool).float().cpu().numpy()
                at += len(batch)
        rows.flush()
        distributed.barrier()
        if world.is_main:
            add_names(options.output, rows, pictures.paths)
    if world.is_main:
        print(f"{options.output}: {list(shape)}, {options.pool} of block {options.layer}", flush=True)
    distributed.barrier()


def open_rows(output: Path, shape: tuple[int, int], world: World) -> np.memmap:
    """float32 `shape` in the file that is being written, on all ranks."""
    partial = writing(output)
    try:
        if world.is_main:
            np.lib.format.open_memmap(partial, "w+", np.float32, shape)
            with open(partial, "r+b") as file:  # room for all: a disk that fills later kills who writes to its memory
                os.posix_fallocate(file.fileno(), 0, os.path.getsize(partial))
        distributed.barrier()
        return np.lib.format.open_memmap(partial, "r+")
    except OSError as error:
        raise UsageError(f"--output {output}: {error.strerror} (all ranks need its folder)") from error


def add_names(output: Path, rows: np.ndarray, paths: PictureList) -> None:
    """The pictures' names: beside an .npy, in a safetensors file's header."""
    names = [paths.name(index) for index in range(len(paths))]
    if output.suffix == ".npy":
        names_of(output).write_text("".join(f"{name}\n" for name in names), "utf-8", "surrogateescape")
        return
    from safetensors.numpy import save_file

    # over the rows' own file, which safetensors replaces
    save_file({"features": np.ascontiguousarray(rows)}, writing(output), metadata={"names": json.dumps(names)})


if __name__ == "__main__":
    main()
