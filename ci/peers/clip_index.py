"""The index of the pairs at scale: how long a start takes, what it costs in memory, and whether a worker's stays flat.

    python -m ci.peers.clip_index [--pairs 1000000] [--ranks 8] [--pictures 200000]

Pairs are made up: a table of as many different picture names (hard links to small JPEGs) and captions of a dozen words.
The peer is what stood here before: lists of Python objects in every process. The curves are drawn beside the result.
"""

from __future__ import annotations

import argparse
import io
import itertools
import os
import resource
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "CLIP_for_PyTorch")]

import clip_pretraining  # noqa: E402, F401  mends torchvision

# isort: split
import numpy as np  # noqa: E402
import psutil  # noqa: E402
from PIL import Image  # noqa: E402

from ci.peers.paired_timing import write_result  # noqa: E402
from clip_pretraining.data.batches import EpochLoader, GlobalBatchSampler  # noqa: E402
from clip_pretraining.data.pairs import Collate, DecodedImages, PairDataset  # noqa: E402
from clip_pretraining.data.tokenization import openai_tokenizer  # noqa: E402
from clip_pretraining.options.arguments import DataArguments  # noqa: E402
from clip_pretraining.training import sources  # noqa: E402
from common.distributed import World  # noqa: E402
from common.run import figures  # noqa: E402

WORDS = "a the small large red blue old new dog cat car house river on near under with of two three in light".split()
LINKS = 20_000  # to one file: file systems have limits
BATCH = 32
MIB = 1 << 20
FORK = get_context("fork")


def write_set(folder: Path, pairs: int) -> None:
    draw = np.random.default_rng(0)
    (folder / "p").mkdir()
    with open(folder / "pairs.csv", "w") as table:
        table.write("image_path,caption\n")
        for i in range(pairs):
            if i % LINKS == 0:
                first = folder / f"p/{i:08}.jpg"
                Image.fromarray(draw.integers(0, 256, (24, 32, 3), dtype=np.uint8)).save(first)
            else:
                os.link(first, folder / f"p/{i:08}.jpg")
            table.write(f"p/{i:08}.jpg,{' '.join(WORDS[j] for j in draw.integers(0, len(WORDS), 12))} no {i}\n")


def start(folder: Path, tars: bool = False) -> tuple[sources.Split, dict[str, float]]:
    """The split, and what its start took; loading the tokenizer is not counted."""
    tokenizer = openai_tokenizer()
    sources.described(tokenizer), tokenizer(["a dog"])  # whatever memory these take, they have taken
    memory, began, worked = private(), time.perf_counter(), time.process_time()
    where = {"train_shards": str(folder / "*.tar")} if tars else {"train_file": str(folder / "pairs.csv")}
    data = DataArguments(check_images=False, **where)
    split = sources.prepare(sources.find("train", data, None), data, tokenizer, 77, 0, World())
    split.identity()
    return split, {
        "seconds": round(time.perf_counter() - began, 1),
        "cpu_seconds": round(time.process_time() - worked, 1),
        "private_mib": round(private() - memory, 1),
    }


def write_tars(folder: Path, pairs: int) -> None:
    """Tars of ten thousand pairs each, of the table's first pictures and captions."""
    with open(folder / "pairs.csv") as table:
        rows = list(itertools.islice(table, 1, pairs + 1))
    for first in range(0, pairs, 10_000):
        with tarfile.open(folder / f"{first:08}.tar", "w") as tar:
            for i, row in enumerate(rows[first : first + 10_000], first):
                name, caption = row.rstrip().split(",", 1)
                for suffix, content in (("jpg", (folder / name).read_bytes()), ("txt", caption.encode())):
                    member = tarfile.TarInfo(f"{i:08}.{suffix}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))


class Lists:
    """What a process had before: an object for every picture and caption."""

    def __init__(self, split: sources.Split):
        self.images, self.captions = list(split.pairs.images), list(split.pairs.captions)
        self.image_of_caption = np.array(split.pairs.image_of_caption, dtype=np.int64)
        self.image_keys = list(split.pairs.image_keys)


def in_process(work: Callable[..., Any], *arguments: Any) -> Any:
    """What `work` returns, from a process of its own, whose memory is gone afterwards."""
    answer = FORK.SimpleQueue()
    process = FORK.Process(target=lambda: answer.put(work(*arguments)))
    process.start()
    found = answer.get()
    process.join()
    return found


def timed_start(folder: Path, tars: bool = False) -> dict[str, float]:
    _, cost = start(folder, tars)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {**cost, "peak_of_process_mib": round(peak)}


def private(pid: int | None = None) -> float:
    return psutil.Process(pid).memory_full_info().uss / MIB


def rank(folder: Path, number: int, ranks: int, meet: Any, answers: Any) -> None:
    """A rank with its index open, every page of it touched, in the middle of its epoch."""
    split, _ = start(folder)
    before = private()
    batches = iter(GlobalBatchSampler(len(split.pairs), 64, 0, number, ranks, True))
    next(batches)
    for values in (*split.pairs.columns().values(), split.tokens.ids, split.tokens.offsets):
        values.sum()
    meet.wait()
    maps = psutil.Process().memory_maps(grouped=True)  # pss: of a page that n processes share an n-th
    mapped = sum(area.pss for area in maps if str(folder) in area.path) / MIB
    answers.put((mapped, private() - before))
    meet.wait()


def all_ranks(folder: Path, ranks: int) -> dict[str, float]:
    meet, answers = FORK.Barrier(ranks), FORK.Queue()
    processes = [FORK.Process(target=rank, args=(folder, r, ranks, meet, answers)) for r in range(ranks)]
    for process in processes:
        process.start()
    found = [answers.get() for _ in processes]
    for process in processes:
        process.join()
    mapped, order = (sum(part) for part in zip(*found, strict=True))
    return {"ranks": ranks, "index_mib": round(mapped), "order_mib_a_rank": round(order / ranks, 1)}


def epoch(folder: Path, pictures: int, as_lists: bool) -> list[tuple[int, float]]:
    """(pictures read, private MiB of the worker that reads them)."""
    split, _ = start(folder)
    pairs = Lists(split) if as_lists else split.pairs
    dataset = PairDataset(pairs, split.tokens, DecodedImages(pairs.images, 16))
    sampler = GlobalBatchSampler(len(split.pairs), BATCH, 0, 0, 1, True)
    batches = iter(EpochLoader(dataset, batch_sampler=sampler, collate_fn=Collate(0, 77), num_workers=1))
    curve = []
    for step, _ in enumerate(itertools.islice(batches, pictures // BATCH)):
        if step % max(1, pictures // BATCH // 50) == 0 and batches._workers[0].is_alive():
            curve.append((step * BATCH, private(batches._workers[0].pid)))
    return curve


def draw_figure(curves: dict[str, list[tuple[int, float]]], path: Path) -> None:
    figure, axis = figures.new((6, 3))
    for name, curve in curves.items():
        rows = np.array(curve)
        axis.plot(rows[:, 0] / 1000, rows[:, 1] - rows[0, 1], label=name)
    axis.set(xlabel="thousand pictures read", ylabel="private memory of a worker,\nMiB above its start")
    axis.legend()
    figures.save(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=1_000_000)
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--pictures", type=int, default=200_000, help="of the epoch whose memory is watched")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_set(folder, options.pairs)
        result = {"first_start": in_process(timed_start, folder), "second_start": in_process(timed_start, folder)}
        write_tars(folder, options.pairs // 10)
        result["tenth_in_tars"] = {n: in_process(timed_start, folder, True) for n in ("first_start", "second_start")}
        sizes = sum(p.stat().st_size for p in (folder / ".clip_cache").glob("*_pairs_*/*.npy"))
        result |= {"files_mib": round(sizes / MIB), "together": all_ranks(folder, options.ranks)}
        curves = {
            "lists, as before": in_process(epoch, folder, options.pictures, True),
            "mapped index": in_process(epoch, folder, options.pictures, False),
        }
    # from its first batches on, and what of it comes after the first fifth of the pictures
    result["worker_grows_by_mib"] = {name: round(curve[-1][1] - curve[0][1], 1) for name, curve in curves.items()}
    result["of_it_later"] = {name: round(curve[-1][1] - curve[len(curve) // 5][1], 1) for name, curve in curves.items()}
    path = write_result("pairs_index", {"pairs": options.pairs, **result})
    draw_figure(curves, path.with_suffix(".png"))


if __name__ == "__main__":
    main()
