#!/usr/bin/env python3
"""Converts ViT weights between torch (MAE names) and MindSpore (MindFormers names).

python convert_weight.py --torch_pth_path mae_finetuned_vit_base.pth --ms_ckpt_path vit_base_p16.ckpt
python convert_weight.py --to torch --ms_ckpt_path vit_base_p16.ckpt --torch_pth_path vit_base_p16.pth
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import vit  # noqa: F401  (first: repairs torchvision)
from common import checkpoint_file
from common.errors import UsageError, print_usage_errors
from vit import mindspore_checkpoint, weights


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--torch_pth_path", "--torch_path", type=Path, required=True, help="torch .pth")
    parser.add_argument("--ms_ckpt_path", "--mindspore_path", type=Path, required=True, help="MindSpore .ckpt")
    parser.add_argument("--to", choices=("mindspore", "torch"), default="mindspore", help="which one is written")
    return parser.parse_args(argv)


@print_usage_errors
def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    to_mindspore = args.to == "mindspore"
    source, target = args.torch_pth_path, args.ms_ckpt_path
    if not to_mindspore:
        source, target = target, source
    if args.ms_ckpt_path.suffix != ".ckpt":
        raise UsageError(f"{args.ms_ckpt_path}: a MindSpore checkpoint is called *.ckpt")
    if target.exists():
        raise UsageError(f"{target} exists and is not overwritten; move it away or choose another name")
    try:
        state = weights.read_state_dict(source)
        if to_mindspore:
            mindspore_checkpoint.write(target, mindspore_checkpoint.to_mindspore(state))
        else:
            checkpoint_file.save({"model": state}, target)
    except (checkpoint_file.CheckpointError, ValueError) as error:
        raise UsageError(str(error)) from error
    print(f"{source} -> {target}: {len(state)} tensors by torch name")


if __name__ == "__main__":
    main()
