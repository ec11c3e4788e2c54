#!/usr/bin/env python3
"""Builds the `clip-roberta` folder that run_clip.py trains: CLIP's vision tower and RoBERTa, joined by two projections.

python save_clip_roberta.py                                    # from the hub, to ./clip-roberta
python save_clip_roberta.py --vision_model DIR --text_model DIR   # from local folders
python save_clip_roberta.py --tiny --captions FILE --output_dir DIR   # a small one from nothing, offline
"""

from __future__ import annotations

import common.requirements

import argparse
import json
from pathlib import Path

from clip_pretraining.exchange import transformers_folder
from clip_pretraining.model import construction
from common.device import seed_everything
from common.errors import UsageError, print_usage_errors


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vision_model", default="openai/clip-vit-base-patch32", help="CLIP model: hub name or folder")
    parser.add_argument("--text_model", default="roberta-base", help="RoBERTa model: hub name or folder")
    parser.add_argument("--output_dir", type=Path, default=Path("clip-roberta"))
    parser.add_argument("--seed", type=int, default=42, help="of the projections (and of all weights from scratch)")
    parser.add_argument("--tiny", action="store_true", help="short for --from_scratch tiny")
    parser.add_argument("--from_scratch", choices=sorted(construction.SIZES), help="random weights, no download")
    parser.add_argument("--family", choices=["dual", "clip"], default="dual", help="from scratch: which model family")
    parser.add_argument("--captions", type=Path, help="from scratch: text, a caption a line; COCO's .json; or a table")
    parser.add_argument("--image_size", type=int, help="from scratch: side of the picture in pixels")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing folder's files")
    return parser.parse_args(argv)


@print_usage_errors
def main(argv: list[str] | None = None) -> None:
    options = parse(argv)
    if options.output_dir.exists() and any(options.output_dir.iterdir()) and not options.overwrite:
        raise UsageError(f"--output_dir {options.output_dir} is not empty: choose another, or give --overwrite")
    size = options.from_scratch or ("tiny" if options.tiny else None)
    if size is None and (options.captions or options.image_size or options.family != "dual"):
        raise UsageError("--captions, --image_size and --family are for random weights: add --tiny or --from_scratch")
    seed_everything(options.seed)
    if size is None:
        model, tokenizer, settings = construction.from_pretrained(options.vision_model, options.text_model)
    else:
        captions = construction.read_captions(options.captions) if options.captions else None
        model, tokenizer, settings = construction.from_scratch(size, options.family, captions, options.image_size)
    transformers_folder.write(model, tokenizer, settings, options.output_dir)
    parameters = sum(p.numel() for p in model.parameters())
    print(
        f"{options.output_dir}: {model.config.model_type}, {parameters / 1e6:.1f} M parameters, {settings.size} pixels"
    )
    print(json.dumps(sorted(p.name for p in options.output_dir.iterdir())))


if __name__ == "__main__":
    main()
