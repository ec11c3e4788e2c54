"""CPU seconds of binarizing text, and of fairseq's way with one worker, on the same corpus; and of making batches.

python -m ci.peers.data2vec_preprocess [--rounds 5]
"""

from __future__ import annotations

import argparse
import contextlib
import io
import re
import tempfile
from pathlib import Path

import numpy as np
import torch

import preprocess
from ci.peers import ROOT
from ci.peers.paired_timing import cpu_seconds, paired, write_result
from data2vec import Dictionary, IndexedDataset
from data2vec.config import load_config
from data2vec.data.pretraining_data import PretrainingData

WORDS, LINES, LINE = 20000, 6000, 25
SPACES = re.compile(r"\s+")


def write_text(path: Path) -> None:
    """Zipf-like words, an empty line now and then."""
    rng = np.random.default_rng(0)
    words = np.array([str(i) for i in range(WORDS)])
    with open(path, "w") as file:
        for length in rng.integers(0, 2 * LINE, LINES):
            file.write(" ".join(words[np.minimum(rng.zipf(1.3, length), WORDS) - 1]) + "\n")


def fairseq_way(text: Path, prefix: Path, dictionary: Dictionary) -> None:
    """FileBinarizer + Dictionary.encode_line + MMapIndexedDatasetBuilder (fairseq 3f6ba43f), one worker."""
    sizes = []
    with open(text, encoding="utf-8") as source, open(prefix, "wb") as file:
        for line in source:
            words = SPACES.sub(" ", line).strip().split()
            ids = torch.IntTensor(len(words) + 1)
            for i, word in enumerate(words):
                ids[i] = dictionary.index(word)
            ids[len(words)] = dictionary.eos_index
            array = np.array(ids.numpy(), dtype=np.uint16)
            file.write(array.tobytes(order="C"))
            sizes.append(array.size)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        write_text(folder / "text")
        quiet = contextlib.redirect_stdout(io.StringIO())
        with quiet:
            preprocess.main(["--trainpref", str(folder / "text"), "--destdir", str(folder / "bin")])
        dictionary = Dictionary.load(folder / "bin" / "dict.txt")
        count = 0

        def ours() -> None:
            nonlocal count
            count += 1
            with contextlib.redirect_stdout(io.StringIO()):
                preprocess.binarize(folder / "text", folder / f"ours{count}", dictionary, 1, io.StringIO())

        def theirs() -> None:
            fairseq_way(folder / "text", folder / "theirs", dictionary)

        ratio = paired(ours, theirs, rounds)
        assert (folder / "ours1.bin").read_bytes() == (folder / "theirs").read_bytes()
        tokens = int(IndexedDataset(folder / "ours1").sizes.sum())
        write_result(
            "data2vec_preprocess",
            {
                "what": f"binarizing {tokens} tokens, one worker",
                "fairseq_over_ours": {"median": ratio.median, "low": ratio.low, "high": ratio.high},
                "ours_tokens_per_cpu_second": round(tokens / ratio.a_seconds),
                "fairseq_tokens_per_cpu_second": round(tokens / ratio.b_seconds),
                "loading_tokens_per_cpu_second": loading_rate(folder / "bin"),
            },
        )


def loading_rate(corpus: Path) -> int:
    """Real tokens a CPU second, from the memory map to masked, padded and planned batches of base.yaml."""
    configs = ROOT / "Data2vec_for_PyTorch/configs/text/pretraining"
    config, _ = load_config(configs, "base", [f"task.data={corpus}", "dataset.disable_validation=true"])
    batches = PretrainingData(config).train_batches(epoch=1)
    tokens = 0

    def load() -> None:
        nonlocal tokens
        tokens = sum(batches[i].num_tokens for i in range(len(batches)))

    seconds = cpu_seconds(load)
    return round(tokens / seconds)


if __name__ == "__main__":
    main()
