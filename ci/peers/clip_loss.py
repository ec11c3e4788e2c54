"""Memory and time of InfoNCE with gradients: in tiles, against the whole matrix of logits; over 1, 2 and 4 ranks.

    python -m ci.peers.clip_loss [--largest 32768] [--dimension 512] [--rounds 7]

Peak memory is what a rank's process grows by; beyond `WHOLE_UP_TO` pairs the whole matrix is not computed: its curve
goes on with its square. The curves are drawn beside the result.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import tempfile
import time
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from ci.peers.paired_timing import write_result
from clip_pretraining.model import loss as losses
from common.run import figures

SMALLEST, TIMED, WHOLE_UP_TO = 2048, 4096, 16384
MIB = 1 << 20
FORK = get_context("fork")


def features(pairs: int, dimension: int) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    unit = (torch.nn.functional.normalize(torch.randn(pairs, dimension, generator=draw), dim=1) for _ in range(2))
    return [x.requires_grad_() for x in unit]


def step(image: torch.Tensor, text: torch.Tensor, in_tiles: bool) -> None:
    losses.TILED_FROM = 0 if in_tiles else 2**62
    scale = torch.tensor(2.6, requires_grad=True)
    losses.contrastive_loss(image, text, scale).backward()


def peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def grown(rank: int, world: int, pairs: int, dimension: int, in_tiles: bool, meeting: str, answers: Any) -> None:
    """Puts by how many MiB this rank's peak grew in a step, over what features and kernels take."""
    if world > 1:
        torch.distributed.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=world)
    image, text = features(pairs // world, dimension)
    step(*features(64, dimension), in_tiles)
    before = peak()
    step(image, text, in_tiles)
    answers.put(peak() - before)


def memory(world: int, pairs: int, dimension: int, in_tiles: bool) -> float:
    """Of the rank that needs most."""
    answers = FORK.SimpleQueue()
    with tempfile.TemporaryDirectory() as folder:
        arguments = (world, pairs, dimension, in_tiles, f"{folder}/meeting", answers)
        ranks = [FORK.Process(target=grown, args=(rank, *arguments)) for rank in range(world)]
        for process in ranks:
            process.start()
        found = [answers.get() for _ in ranks]
        for process in ranks:
            process.join()
    return round(max(found), 1)


def seconds(pairs: int, dimension: int, rounds: int) -> dict[str, Any]:
    """CPU seconds of both, by turns."""
    batch, spent = features(pairs, dimension), {True: [], False: []}
    for turn in range(rounds + 1):
        for in_tiles in spent:
            began = time.process_time()
            step(*batch, in_tiles)
            if turn:  # the first warms up
                spent[in_tiles].append(time.process_time() - began)
    ratios = [whole / tiles for tiles, whole in zip(spent[True], spent[False], strict=True)]
    return {
        "seconds_in_tiles": round(statistics.median(spent[True]), 3),
        "seconds_whole": round(statistics.median(spent[False]), 3),
        "versus": {"median": statistics.median(ratios), "low": min(ratios), "high": max(ratios)},
    }


def draw_figure(curves: dict[str, dict[int, float]], path: Path) -> None:
    figure, axis = figures.new((6, 3.4))
    for name, curve in curves.items():
        axis.loglog(list(curve), list(curve.values()), "o:" if "extrapolated" in name else "o-", label=name)
    axis.set(xlabel="pairs of the global batch", ylabel="MiB a rank, above its features")
    pairs = sorted({pairs for curve in curves.values() for pairs in curve})
    axis.set_xticks(pairs, [f"{number:,}" for number in pairs])
    axis.minorticks_off()
    axis.grid(alpha=0.3)
    axis.legend(fontsize="small")
    figures.save(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--largest", type=int, default=32768)
    parser.add_argument("--dimension", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    torch.set_num_threads(1)
    sizes = [size for size in (SMALLEST << shift for shift in range(8)) if size <= options.largest]
    curves: dict[str, dict[int, float]] = {}
    for world in (1, 2, 4):
        name = "in tiles" + (f", {world} ranks" if world > 1 else "")
        some = sizes if world == 1 else [size for size in sizes if TIMED < size <= WHOLE_UP_TO]
        curves[name] = {size: memory(world, size, options.dimension, True) for size in some}
    computed = [size for size in sizes if size <= WHOLE_UP_TO]
    whole = curves["whole matrix"] = {size: memory(1, size, options.dimension, False) for size in computed}
    last = computed[-1]
    if options.largest > last:
        curves["extrapolated"] = {
            last: whole[last],
            options.largest: round(whole[last] * (options.largest / last) ** 2),
        }
    of_largest = {**whole, **curves.get("extrapolated", {})}[options.largest]
    result = {
        "what": "peak MiB of InfoNCE with gradients above the features, by pairs of the global batch",
        "dimension": options.dimension,
        "peak_mib": curves,
        "times_less_at_the_largest": round(of_largest / curves["in tiles"][options.largest], 1),
    }
    timed = min(TIMED, options.largest)
    result[f"whole_over_tiles_at_{timed}"] = seconds(timed, options.dimension, options.rounds)
    path = write_result("clip_loss", result)
    draw_figure(curves, path.with_suffix(".png"))


if __name__ == "__main__":
    main()
