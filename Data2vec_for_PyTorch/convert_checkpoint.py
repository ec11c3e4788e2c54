"""Checkpoint -> Hugging Face Data2VecTextModel folder, or such a folder -> checkpoint.

python convert_checkpoint.py checkpoint_best.pt my_model/            # the student; --teacher for the teacher
python convert_checkpoint.py my_model/ checkpoint_converted.pt
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repo root, for common/

from common import checkpoint_file
from common.checkpoint_file import CheckpointError
from common.device import UsageError, print_usage_errors
from data2vec import build_model
from data2vec.checkpoint import load_weights
from data2vec.huggingface import export_huggingface, load_huggingface


@print_usage_errors
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path)
    parser.add_argument("destination", type=Path)
    parser.add_argument("--teacher", action="store_true", help="export the EMA teacher, not the student")
    options = parser.parse_args(argv)
    try:
        if options.source.is_dir():
            if options.destination.exists():
                raise UsageError(f"{options.destination} exists and is not overwritten")
            checkpoint_file.save(load_huggingface(options.source), options.destination)
        else:
            export_huggingface(load_encoder(options.source, options.teacher), options.destination)
    except (CheckpointError, FileExistsError, ValueError) as error:
        raise UsageError(str(error)) from None
    print(f"{options.source} -> {options.destination}")


def load_encoder(path: Path, teacher: bool):
    """The student or the teacher of a pretraining checkpoint, fairseq's or ours."""
    checkpoint = checkpoint_file.load(path)
    if "cfg" not in checkpoint or "model" not in checkpoint:
        raise UsageError(f"{path}: no pretraining checkpoint (it has no 'cfg' and 'model')")
    vocab_size = len(checkpoint["model"]["encoder.sentence_encoder.embed_tokens.weight"])
    model = build_model(checkpoint["cfg"]["model"], vocab_size)
    load_weights(model, checkpoint, path)
    if teacher and model.encoder.teacher is None:
        raise UsageError(f"{path}: holds no teacher (encoder._ema)")
    return model.encoder.teacher if teacher else model.encoder.sentence_encoder


if __name__ == "__main__":
    main()
