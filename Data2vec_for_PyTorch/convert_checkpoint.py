"""Checkpoint -> Hugging Face Data2VecTextModel or Data2VecVisionModel folder, or such a folder -> checkpoint.

python convert_checkpoint.py checkpoint_best.pt my_model/ --encoder-json encoder.json --vocab-bpe vocab.bpe \
    --dict data-bin/dict.txt                                         # the student; --teacher for the teacher
python convert_checkpoint.py my_model/ checkpoint_converted.pt
"""

from __future__ import annotations

import common.requirements

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from common import checkpoint_file
from common.checkpoint_file import CheckpointError
from common.errors import UsageError, print_usage_errors
from data2vec.data.dictionary import MASK, Dictionary
from data2vec.model.encoder import SentenceEncoder
from data2vec.model.multi.model import Data2VecMulti
from data2vec.model.vision_model import Data2VecVision
from data2vec.weights.huggingface import export_huggingface, load_huggingface
from data2vec.weights.pretrained import model_of, text_encoder
from data2vec.weights.tokenizer import export_tokenizer
from data2vec.weights.vision_weights import export_huggingface_vision, load_huggingface_vision
from data2vec.weights.vocabulary import check_vocabulary


@print_usage_errors
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path)
    parser.add_argument("destination", type=Path)
    parser.add_argument("--teacher", action="store_true", help="export the EMA teacher, not the student")
    parser.add_argument("--encoder-json", type=Path, help="text: bpe_encode.py's file, for the tokenizer")
    parser.add_argument("--vocab-bpe", type=Path, help="the other one")
    parser.add_argument("--dict", type=Path, help="dict.txt of the corpus")
    options = parser.parse_args(argv)
    try:
        if options.source.is_dir():
            if options.destination.exists():
                raise UsageError(f"{options.destination} exists and is not overwritten")
            checkpoint_file.save(load_folder(options.source), options.destination)
        else:
            checkpoint = checkpoint_file.load(options.source)
            export(model_of(checkpoint, options.source), checkpoint, options)
    except (CheckpointError, FileExistsError, ValueError) as error:
        raise UsageError(str(error)) from None
    print(f"{options.source} -> {options.destination}")


def export(model: torch.nn.Module, checkpoint: dict[str, Any], options: argparse.Namespace) -> None:
    if isinstance(model, Data2VecMulti) and model.picture_size:
        raise UsageError(
            f"{options.source}: data2vec 2.0's picture encoder (post-norm, fixed positions) is no model of Hugging "
            "Face's: use it here, extract_features.py or probe.py"
        )
    if isinstance(model, Data2VecVision):
        export_huggingface_vision(vision_encoder(model, options.teacher, options.source), options.destination)
    else:
        export_text(text_encoder(model, options.teacher, options.source), checkpoint, options)


def export_text(encoder: SentenceEncoder, checkpoint: dict[str, Any], options: argparse.Namespace) -> None:
    """The model and its tokenizer, or the model alone with a word about it."""
    files = (options.encoder_json, options.vocab_bpe, options.dict)
    if not any(files):
        print("no tokenizer is written: give --encoder-json, --vocab-bpe and --dict, those of the corpus", flush=True)
        export_huggingface(encoder, options.destination)
        return
    if not all(files):
        raise UsageError("--encoder-json, --vocab-bpe and --dict belong together: give all three")
    for path in files:
        if not path.is_file():
            raise UsageError(f"{path}: no such file")
    if (options.destination / "config.json").exists():
        raise UsageError(f"{options.destination} holds a model already and is not overwritten")
    vocab = Dictionary.load(options.dict)
    vocab.add_symbol(MASK)
    check_vocabulary(vocab, options.dict, checkpoint, options.source)
    longest = encoder.config.max_source_positions
    ids = export_tokenizer(options.destination, options.encoder_json, options.vocab_bpe, vocab, longest)
    export_huggingface(encoder, options.destination, ids)


def load_folder(folder: Path) -> dict:
    """{"model": weights} of a text or an image model's folder."""
    config = folder / "config.json"
    vision = config.is_file() and json.loads(config.read_text()).get("model_type") == "data2vec-vision"
    return (load_huggingface_vision if vision else load_huggingface)(folder)


def vision_encoder(model: Data2VecVision, teacher: bool, path: Path) -> Data2VecVision:
    """The student, or a model whose encoder is the teacher's (which may share the student's patch embedding)."""
    if not teacher:
        return model
    if model.teacher is None:
        raise UsageError(f"{path}: holds no teacher (_ema)")
    if not model.config.ema_transformer_only:
        return model.teacher
    model.encoder.load_state_dict(model.teacher.state_dict())
    return model


if __name__ == "__main__":
    main()
