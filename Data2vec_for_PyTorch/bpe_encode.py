"""Raw text -> GPT-2 BPE ids, one line a line (fairseq's multiprocessing_bpe_encoder).

    python bpe_encode.py --encoder-json encoder.json --vocab-bpe vocab.bpe \
        --inputs train.raw --outputs train.bpe --keep-empty --workers 8

Without GPT-2's two files, `--learn 8000` makes them from the first input (byte-level BPE of that many entries).
"""

from __future__ import annotations

import common.requirements

import argparse
import sys
from functools import partial
from pathlib import Path

from tqdm import tqdm

from common.errors import UsageError, print_usage_errors
from data2vec.data.bpe import load_tokenizer
from data2vec.data.text_files import map_chunks, read_lines

BYTES = 256


@print_usage_errors
def main(argv: list[str] | None = None) -> None:
    options = parse(argv)
    check_paths(options)
    try:
        if options.learn:
            learn(options.inputs[0], options.learn, options.encoder_json, options.vocab_bpe)
        load_tokenizer(options.encoder_json, options.vocab_bpe)  # before an output is begun
        for source, output in zip(options.inputs, options.outputs, strict=True):
            filtered = encode_file(source, output, options)
            print(f"{source} -> {output}" + (f", {filtered} empty lines left out" if filtered else ""), flush=True)
    except (OSError, ValueError) as error:
        raise UsageError(str(error)) from None


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--encoder-json", required=True, help="GPT-2's encoder.json")
    parser.add_argument("--vocab-bpe", required=True, help="GPT-2's vocab.bpe")
    parser.add_argument("--inputs", nargs="+", required=True)
    parser.add_argument("--outputs", nargs="+", required=True)
    parser.add_argument("--keep-empty", action="store_true", help="keep empty lines: they separate documents")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--learn", type=int, metavar="N", help="first make the two files from the first input")
    return parser.parse_args(argv)


def check_paths(options: argparse.Namespace) -> None:
    if len(options.inputs) != len(options.outputs):
        raise UsageError(f"{len(options.inputs)} --inputs but {len(options.outputs)} --outputs: give as many")
    if len(set(options.outputs)) < len(options.outputs):
        raise UsageError(f"--outputs {' '.join(options.outputs)}: name one file for each input")
    if options.learn is not None and options.learn < BYTES:
        raise UsageError(f"--learn {options.learn}: give {BYTES} or more: the vocabulary begins with every byte")
    made = [options.encoder_json, options.vocab_bpe] if options.learn else []
    needed = [*options.inputs, *([] if options.learn else (options.encoder_json, options.vocab_bpe))]
    for path in needed:
        if not Path(path).is_file():
            raise UsageError(f"{path}: no such file")
    for path in [*options.outputs, *made]:
        if Path(path).exists():
            raise UsageError(f"{path} exists and is not overwritten")


def learn(source: str, size: int, encoder_json: str, vocab_bpe: str) -> None:
    """Byte-level BPE in GPT-2's file format. ValueError when the text cannot be read."""
    from tokenizers import ByteLevelBPETokenizer

    tokenizer = ByteLevelBPETokenizer()
    try:
        tokenizer.train([source], vocab_size=size, show_progress=sys.stderr.isatty())
    except Exception as error:  # the library has no class of its own
        raise ValueError(f"{source}: {error}") from None
    folder = Path(encoder_json).parent
    vocabulary, merges = (Path(path) for path in tokenizer.save_model(str(folder), f".learned.{Path(source).name}"))
    vocabulary.rename(encoder_json)
    merges.rename(vocab_bpe)


def encode_file(source: str, output: str, options: argparse.Namespace) -> int:
    """Writes the encoded lines in order, or no file at all; returns how many empty ones were left out."""
    work = partial(encode_chunk, options.encoder_json, options.vocab_bpe, options.keep_empty)
    filtered = 0
    bar = tqdm(total=Path(source).stat().st_size, unit="B", unit_scale=True, disable=not sys.stderr.isatty())
    with open(output, "x", encoding="utf-8") as file, bar:
        try:
            for (text, dropped), size in map_chunks(work, source, options.workers):
                file.write(text)
                filtered += dropped
                bar.update(size)
        except BaseException:
            Path(output).unlink()
            raise
    return filtered


def encode_chunk(encoder_json: str, vocab_bpe: str, keep_empty: bool, path: str, start: int, stop: int):
    """(text, empty lines left out)."""
    lines = [line.strip() for line in read_lines(path, start, stop)]
    kept = lines if keep_empty else [line for line in lines if line]
    encodings = load_tokenizer(encoder_json, vocab_bpe).encode_batch(kept)
    text = "".join(" ".join(map(str, encoding.ids)) + "\n" for encoding in encodings)
    return text, len(lines) - len(kept)


if __name__ == "__main__":
    main()
