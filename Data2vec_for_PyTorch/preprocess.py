"""Text -> binarized corpus, with fairseq-preprocess' options and bytes.

    python preprocess.py --only-source --srcdict dict.txt --trainpref train.bpe --validpref valid.bpe \
        --testpref test.bpe --destdir data-bin --workers 8

Input: one sentence a line, tokens separated by spaces, an empty line between documents. Without --srcdict the
vocabulary is made from the training text.
"""

from __future__ import annotations

import common.requirements

import argparse
import sys
import time
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
from tqdm import tqdm

from common.errors import UsageError, print_usage_errors
from data2vec.data.dictionary import Dictionary
from data2vec.data.indexed_dataset import IndexedDatasetBuilder, best_fitting_int_dtype, files_of
from data2vec.data.text_files import map_chunks, read_lines


@print_usage_errors
def main(argv: list[str] | None = None) -> None:
    options = parse(argv)
    splits = split_files(options)
    destination = Path(options.destdir)
    check_paths(options, splits, destination)
    try:
        destination.mkdir(parents=True, exist_ok=True)
        with open(destination / "preprocess.log", "a", encoding="utf-8") as log:
            write_log(log, f"{vars(options)}")
            dictionary = make_dictionary(options, log)
            dictionary.save(destination / "dict.txt")
            for name, path in splits.items():
                binarize(path, destination / name, dictionary, options.workers, log)
    except (OSError, ValueError) as error:
        raise UsageError(str(error)) from None
    print(f"wrote the preprocessed data to {destination}")


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only-source", action="store_true", help="accepted: there is never a target language here")
    parser.add_argument("--trainpref", help="training text, several separated by commas")
    parser.add_argument("--validpref", help="validation text")
    parser.add_argument("--testpref", help="test text")
    parser.add_argument("--destdir", default="data-bin")
    parser.add_argument("--srcdict", help="vocabulary to use instead of making one")
    parser.add_argument("--thresholdsrc", type=int, default=0, help="leave out words seen fewer times than this")
    parser.add_argument("--nwordssrc", type=int, default=-1, help="at most this many entries in the vocabulary")
    parser.add_argument("--padding-factor", type=int, default=8, help="fill the vocabulary to a multiple of this")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--dataset-impl", choices=["mmap"], default="mmap")
    return parser.parse_args(argv)


def split_files(options: argparse.Namespace) -> dict[str, Path]:
    """Text file by split name; further files of a split become train1, valid1, ..., as in fairseq."""
    splits = {}
    for name in ("train", "valid", "test"):
        given = getattr(options, f"{name}pref")
        for i, path in enumerate(given.split(",") if given else []):
            splits[name if i == 0 else f"{name}{i}"] = Path(path)
    return splits


def check_paths(options: argparse.Namespace, splits: dict[str, Path], destination: Path) -> None:
    if not splits:
        raise UsageError("nothing to do: give --trainpref, --validpref or --testpref")
    if not options.srcdict and not options.trainpref:
        raise UsageError("a vocabulary is made from training text: give --trainpref, or one to use with --srcdict")
    for path in [*splits.values(), *([Path(options.srcdict)] if options.srcdict else [])]:
        if not path.is_file():
            raise UsageError(f"{path}: no such file")
    outputs = [destination / "dict.txt"] + [file for name in splits for file in files_of(destination / name)]
    for output in outputs:
        if output.exists():
            raise UsageError(f"{output} exists and is not overwritten: choose another --destdir")


def make_dictionary(options: argparse.Namespace, log) -> Dictionary:
    """Loaded from --srcdict, or counted over the training text."""
    if options.srcdict:
        return Dictionary.load(options.srcdict)
    counts: Counter[str] = Counter()
    for name, path in split_files(options).items():
        if name.startswith("train"):  # train1, ... too
            for part in progress(map_chunks(count_words, path, options.workers), path, "counting"):
                counts.update(part)
    dictionary = Dictionary.from_counts(counts, options.thresholdsrc, options.nwordssrc, options.padding_factor)
    write_log(log, f"dictionary: {len(dictionary)} types")
    return dictionary


def count_words(path: Path, start: int, stop: int) -> Counter:
    lines = read_lines(path, start, stop)
    counts = Counter("\n".join(lines).split())
    counts["</s>"] += len(lines)
    return counts


def binarize(path: Path, prefix: Path, dictionary: Dictionary, workers: int, log) -> None:
    """Writes one split; the same bytes for any number of workers, since chunks are appended in order."""
    began = time.perf_counter()
    dtype = best_fitting_int_dtype(len(dictionary))
    builder = IndexedDatasetBuilder(prefix, dtype)
    sentences = tokens = unknown = 0
    work = partial(encode_chunk, dictionary.indices, dictionary.unk_index, dictionary.eos_index, dtype)
    for ids, sizes in progress(map_chunks(work, path, workers), path, f"binarizing {prefix.name}"):
        builder.add_items(ids, sizes)
        sentences += len(sizes)
        tokens += len(ids)
        unknown += int((ids == dictionary.unk_index).sum())
    builder.finalize()
    seconds = time.perf_counter() - began
    share = 100 * unknown / max(tokens, 1)
    write_log(log, f"{path}: {sentences} sents, {tokens} tokens, {share:.3}% replaced (by <unk>), {seconds:.1f} s")


def encode_chunk(
    indices: dict[str, int], unknown: int, eos: int, dtype: type, path: Path, start: int, stop: int
) -> tuple[np.ndarray, np.ndarray]:
    """(ids of all lines in a row, each line closed by </s>; tokens of each line)."""
    ids: list[int] = []
    ends = []
    get = indices.get
    for line in read_lines(path, start, stop):
        ids += [get(word, unknown) for word in line.split()]
        ids.append(eos)
        ends.append(len(ids))
    return np.array(ids, dtype=dtype), np.diff(np.array([0, *ends], dtype=np.int64))


def progress(chunks, path: Path, what: str):
    """The chunks' results, with a bar over the file's bytes on a terminal."""
    with tqdm(total=path.stat().st_size, unit="B", unit_scale=True, desc=what, disable=not sys.stderr.isatty()) as bar:
        for result, size in chunks:
            bar.update(size)
            yield result


def write_log(log, message: str) -> None:
    print(message, flush=True)
    log.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} | INFO | preprocess | {message}\n")
    log.flush()


if __name__ == "__main__":
    main()
