"""Prints pictures as the visual tokens that BEiT v2 learns to predict: a table of code numbers for each.

python print_tokens.py --tokenizer_weight FILE picture.jpg [more.jpg ...] [--figure tokens.png]
"""

from __future__ import annotations

import common.requirements

import argparse
from pathlib import Path

import torch

from beit2.data.labelled import CentreCrop
from beit2.data.normalizer import Normalizer
from beit2.data.reading import read_image
from beit2.model.tokenizer_file import PUBLISHED, tokenizer_of
from beit2.prediction_figure import check_figure, token_pictures
from common.errors import UsageError, print_usage_errors
from common.run.figures import picture_rows

HALF = (0.5, 0.5, 0.5)


def read_options(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("print_tokens.py", description=__doc__.splitlines()[0])
    parser.add_argument("pictures", nargs="+", type=Path)
    parser.add_argument("--tokenizer_weight", default=PUBLISHED, help="file, address, or the name of a published one")
    parser.add_argument("--tokenizer_model", help="where the file does not say which model it is of")
    parser.add_argument("--figure", type=Path, help="pictures above their tokens, alike codes in alike colours")
    options = parser.parse_args(argv)
    if options.figure is not None:
        check_figure(options.figure, "--figure")
        if options.figure.exists():  # it may be one of the pictures
            raise UsageError(f"--figure {options.figure}: exists, and is not overwritten")
    for path in options.pictures:
        if not path.is_file():
            raise UsageError(f"{path}: no such picture; name files, not folders")
    return options


@print_usage_errors
def main(argv: list[str] | None = None) -> None:
    options = read_options(argv)
    tokenizer = tokenizer_of(options.tokenizer_weight, options.tokenizer_model)
    whole = CentreCrop(tokenizer.encoder.patch_embed.img_size[0], crop_pct=1.0)
    batch = torch.stack([whole(read_image(path)) for path in options.pictures])  # uint8 [B, S, S, 3]
    unit = Normalizer(HALF, HALF, torch.device("cpu")).unit(batch)
    tokens = torch.cat([tokenizer.get_codebook_indices(image[None]) for image in unit])  # [B, N]
    height, width = tokenizer.window_size
    cell = len(str(tokenizer.n_code - 1))
    for path, grid in zip(options.pictures, tokens.view(-1, height, width), strict=True):
        print(f"{path}: {height} x {width} tokens, {len(grid.unique())} different ones of {tokenizer.n_code}")
        for row in grid.tolist():
            print(" ".join(f"{token:{cell}d}" for token in row))
    if options.figure is not None:
        rows = [batch.numpy() / 255, token_pictures(tokenizer, tokens, unit.shape[-2:])]
        picture_rows(rows, ("picture", "tokens"), options.figure)
        print(f"drawn: {options.figure}")


if __name__ == "__main__":
    main()
