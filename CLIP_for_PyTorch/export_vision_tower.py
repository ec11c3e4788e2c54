#!/usr/bin/env python3
"""Writes the trained vision tower alone, for users of `transformers` or of open_clip.

python export_vision_tower.py --model_name_or_path output --output_dir vision
python export_vision_tower.py --model_name_or_path output --output_dir vision --format open_clip
"""

from __future__ import annotations

import argparse
from pathlib import Path

from clip_pretraining.model import export, loading
from common.errors import UsageError, print_usage_errors


@print_usage_errors
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_name_or_path", required=True, help="what run_clip.py trained")
    parser.add_argument("--output_dir", required=True, type=Path)
    parser.add_argument("--format", choices=["transformers", "open_clip"], default="transformers")
    options = parser.parse_args(argv)
    if options.output_dir.exists() and any(options.output_dir.iterdir()):
        raise UsageError(f"--output_dir {options.output_dir} is not empty: choose another")
    model = loading.load_model(options.model_name_or_path)
    settings = loading.image_settings(options.model_name_or_path, model.config)
    write = export.to_transformers if options.format == "transformers" else export.to_open_clip
    print(write(model, settings, options.output_dir))


if __name__ == "__main__":
    main()
