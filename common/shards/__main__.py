"""One plain file of a sharded checkpoint, by one process."""

from __future__ import annotations

import argparse
from pathlib import Path

from common import checkpoint_file
from common.checkpoint_file import CheckpointError
from common.shards import read_shards


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m common.shards", description="Makes one plain file of a sharded checkpoint."
    )
    parser.add_argument("folder", type=Path, help="the checkpoint, e.g. output/checkpoints/checkpoint-1200")
    parser.add_argument("file", type=Path, help="torch file with the weights under 'model' (and 'ema'), by name")
    options = parser.parse_args(argv)
    if options.file.exists():
        parser.error(f"{options.file} exists: name a new file")
    try:
        parts = read_shards(options.folder)
    except CheckpointError as error:
        parser.error(str(error))
    weights = {name: part for name, part in parts.items() if name != "optimizer"}
    checkpoint_file.save(weights, options.file)
    print(f"{options.file}: {len(parts['model'])} tensors of {options.folder}; the optimizer's state stays there")


if __name__ == "__main__":
    main()
