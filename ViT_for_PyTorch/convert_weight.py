#!/usr/bin/env python3
"""Converts ViT weights: torch (MAE's names) to and from MindSpore (MindFormers' names), and to timm, HF, ONNX.

python convert_weight.py --torch_path mae_finetuned_vit_base.pth --mindspore_path vit_base_p16.ckpt
python convert_weight.py --to torch --mindspore_path vit_base_p16.ckpt --torch_path vit_base_p16.pth
python convert_weight.py --to timm --torch_path output --output my_timm_vit
python convert_weight.py --to huggingface --torch_path output --output my_hf_vit
python convert_weight.py --to onnx --torch_path output --output vit.onnx
"""

import common.requirements

import argparse
from collections.abc import Sequence
from pathlib import Path

import vit  # noqa: F401  (first: repairs torchvision)
from common import checkpoint_file
from common.errors import UsageError, print_usage_errors
from vit import mindspore_checkpoint
from vit.config.description import config_of_file, named
from vit.find_weights import weights_of
from vit.model.vision_transformer import build
from vit.weights import export
from vit.weights import loading as weights
from vit.weights.download import DownloadError
from vit.weights.labels import load_class_names


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    group = parser.add_argument_group("what becomes what")
    group.add_argument(
        "--to",
        choices=("mindspore", "torch", *export.WRITERS),
        default="mindspore",
        help="what is written: a MindSpore .ckpt, a torch .pth, a folder of timm or Hugging Face, an ONNX file "
        "(default: mindspore)",
    )
    group.add_argument(
        "--torch_path",
        "--torch_pth_path",
        required=True,
        metavar="PATH",
        help="with --to torch the .pth to write; else the weights: any checkpoint that run_vit.py takes, the output "
        "folder of a run, or a published name",
    )
    group.add_argument(
        "--mindspore_path", "--ms_ckpt_path", type=Path, metavar="FILE", help="the MindSpore .ckpt, written or read"
    )
    group.add_argument(
        "--output", type=Path, metavar="PATH", help="of --to timm, huggingface and onnx: the folder or file"
    )
    group.add_argument(
        "--model_name",
        metavar="NAME",
        help="the model of a file that does not tell its own, e.g. vit_base_p16, or a name of timm's",
    )
    return parser.parse_args(argv)


@print_usage_errors
def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    try:
        if args.to in export.WRITERS:
            written = _export(args)
        else:
            written = _convert(args)
    except (checkpoint_file.CheckpointError, DownloadError, ValueError) as error:
        raise UsageError(str(error)) from error
    print(written)


def _convert(args: argparse.Namespace) -> str:
    """Between torch and MindSpore, name by name; no model is built."""
    if args.mindspore_path is None:
        raise UsageError(f"--to {args.to} needs --mindspore_path")
    if args.mindspore_path.suffix != ".ckpt":
        raise UsageError(f"{args.mindspore_path}: a MindSpore checkpoint must be called *.ckpt")
    if args.output is not None:
        raise UsageError("--output is of --to timm, huggingface and onnx; give --mindspore_path and --torch_path")
    if args.model_name is not None:
        raise UsageError(
            f"--model_name is not of --to {args.to}, which renames tensors and builds no model; leave it out"
        )
    to_mindspore = args.to == "mindspore"
    target = args.mindspore_path if to_mindspore else Path(args.torch_path)
    _refuse_existing(target)
    source = _found(args.torch_path) if to_mindspore else args.mindspore_path
    state = weights.read_state_dict(source)
    if to_mindspore:
        mindspore_checkpoint.write(target, mindspore_checkpoint.to_mindspore(state))
    else:
        checkpoint_file.save({"model": state}, target)
    return f"{source} -> {target}: {len(state)} tensors by torch name"


def _export(args: argparse.Namespace) -> str:
    """A whole model for another program."""
    if args.output is None:
        raise UsageError(f"--to {args.to} needs --output: {'a file' if args.to == 'onnx' else 'a folder'} to write")
    if args.mindspore_path is not None:
        raise UsageError(
            f"--mindspore_path is not of --to {args.to}: give the MindSpore file to read as its --torch_path"
        )
    _refuse_existing(args.output)
    source = _found(args.torch_path)
    config = named(args.model_name) if args.model_name else config_of_file(source)
    state = weights.read_state_dict(source)
    if args.model_name and "head.weight" in state:
        config.num_classes = len(state["head.weight"])
    model = build(config)
    weights.load_weights(model, source, head="required")
    export.write(args.to, model, args.output, load_class_names(source))
    return f"{source} -> {args.output}: {config.num_classes} classes, pictures of {config.image_size} pixels"


def _found(name_or_path: str) -> Path:
    """A file or a run's folder as it is, else a published name."""
    is_name = "/" not in name_or_path.removeprefix("mindspore/") and "." not in name_or_path
    return weights_of(name_or_path) if Path(name_or_path).exists() or is_name else Path(name_or_path)


def _refuse_existing(target: Path) -> None:
    if target.exists():
        raise UsageError(f"{target} exists and is not overwritten; move it away or choose another name")


if __name__ == "__main__":
    main()
