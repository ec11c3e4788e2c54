"""Writes a checkpoint for other libraries, once their outputs are found equal to ours.

python export_weights.py --checkpoint checkpoint-best.pth --to timm --output DIR         # pretraining, fine-tuning
python export_weights.py --checkpoint checkpoint.pth --to transformers --output DIR
python export_weights.py --checkpoint checkpoint.pth --to safetensors --output DIR       # tokenizers, too
"""

from __future__ import annotations

import common.requirements

import argparse
from pathlib import Path

from beit2 import weights_out
from beit2.model.tokenizer import NOT_TOKENIZER
from beit2.options import mean_and_std
from beit2.weights.download import local_file
from beit2.weights.files import read_checkpoint
from common.errors import UsageError, print_usage_errors


@print_usage_errors
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser("export_weights.py", description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", required=True, help="of pretraining, fine-tuning or a tokenizer's training")
    parser.add_argument("--to", choices=weights_out.LIBRARIES, required=True)
    parser.add_argument("--output", type=Path, required=True, help="a new folder")
    parser.add_argument("--model_ema", action="store_true", help="the weight average instead of the weights")
    parser.add_argument("--imagenet_default_mean_and_std", action="store_true", help="where the file does not say it")
    options = parser.parse_args(argv)
    if options.output.exists() and any(options.output.iterdir()):
        raise UsageError(f"--output {options.output}: is not empty; name a new folder")

    path = local_file(options.checkpoint)
    checkpoint = read_checkpoint(path)
    if options.model_ema and "model_ema" not in checkpoint:
        raise UsageError(f"{path}: has no weight average; leave out --model_ema")
    state = checkpoint["model_ema"] if options.model_ema else checkpoint.get("model", checkpoint)
    trained = checkpoint.get("args")
    if getattr(trained, "imagenet_default_mean_and_std", False):
        options.imagenet_default_mean_and_std = True
    is_tokenizer = "quantize.embedding.weight" in state
    if options.to == "safetensors":
        state = {
            name: tensor for name, tensor in state.items() if not is_tokenizer or not name.startswith(NOT_TOKENIZER)
        }
        plain = {name: value for name, value in vars(trained or argparse.Namespace()).items() if name != "given"}
        difference = weights_out.export_safetensors(state, options.output, plain)
    elif is_tokenizer:
        raise UsageError(f"--to {options.to}: it has no VQ-KD tokenizer; give --to safetensors")
    else:
        export = weights_out.export_timm if options.to == "timm" else weights_out.export_transformers
        difference = export(state, options.output, *mean_and_std(options))
    print(f"{options.output}: for {options.to}, largest relative difference of the outputs {difference:.1e}")


if __name__ == "__main__":
    main()
