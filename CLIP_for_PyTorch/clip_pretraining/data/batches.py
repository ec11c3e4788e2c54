"""Which pairs meet in a batch: the order of an epoch, and each rank's share of it."""

from __future__ import annotations

import itertools
from array import array
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch.utils.data import DataLoader, Sampler

from common.device import mix_seed


class GlobalBatchSampler(Sampler):
    """Batches of one rank out of the global batches of an epoch.

    The order is a permutation drawn from (seed, epoch). Rank r takes the r-th share of every global batch, so that the
    same pairs meet in a step on any number of ranks. Without `drop_last` a ragged last global batch is shared out
    evenly, which leaves out fewer than `world` pairs.

    `keys` int [pairs, K]: pairs that share a key (the picture, the caption) are no negatives of each other, so they are
    kept out of one global batch for as long as there are others to take.

    With `weights` pairs are drawn with replacement instead, as many as there are: see `drawn`.
    """

    def __init__(
        self,
        pairs: int,
        batch: int,
        seed: int,
        rank: int,
        world: int,
        drop_last: bool,
        keys: np.ndarray | None = None,
        weights: Sequence[float] | None = None,
        starts: Sequence[int] = (0,),
    ):
        self.pairs, self.batch, self.seed, self.rank, self.world = pairs, batch, seed, rank, world
        self.keys, self.weights, self.starts = keys, weights, np.asarray(starts)
        tail = pairs % (batch * world) // world
        self.tail = 0 if drop_last else tail
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.pairs // (self.batch * self.world) + (self.tail > 0)

    def __iter__(self) -> Iterator[list[int]]:
        whole, tail = self._share()
        yield from map(np.ndarray.tolist, whole)
        if self.tail:
            yield tail.tolist()

    def _share(self) -> tuple[np.ndarray, np.ndarray]:
        """This rank's batches of the epoch, int32 [steps, batch], and its share of a ragged last one."""
        generator = np.random.default_rng(mix_seed(self.seed, self.epoch))
        if self.weights is None:
            order = np.arange(self.pairs, dtype=np.int32)
            generator.shuffle(order)
        else:
            order = drawn(generator, self.pairs, self.starts, self.weights)
        if self.keys is not None:
            order = apart(order, self.keys, self.batch * self.world)
        whole = self.pairs // (self.batch * self.world)
        rest = order[whole * self.batch * self.world :]
        shares = order[: len(order) - len(rest)].reshape(whole, self.world, self.batch)[:, self.rank]
        return shares.copy(), rest[self.rank * self.tail : (self.rank + 1) * self.tail].copy()


def drawn(generator: np.random.Generator, pairs: int, starts: np.ndarray, weights: Sequence[float]) -> np.ndarray:
    """Int32 [pairs]: for each place a source by its weight, then any pair of that source, however often it came before.

    Args:
        starts: int [sources], first pair of each.
        weights: how often a source is drawn, in proportion to the others.
    """
    sizes = np.diff(np.append(starts, pairs))
    share = np.asarray(weights, dtype=np.float64) / sum(weights)
    order = np.empty(pairs, dtype=np.int32)
    for first in range(0, pairs, 1 << 20):  # in pieces, for memory
        piece = order[first : first + (1 << 20)]
        source = generator.choice(len(sizes), size=len(piece), p=share)
        piece[:] = starts[source] + generator.integers(0, sizes[source])
    return order


def apart(order: np.ndarray, keys: np.ndarray, batch: int) -> np.ndarray:
    """`order` changed so that, in each run of `batch` pairs, none shares a key with another.

    A pair that would clash waits for the next run. Towards the end, where only clashing pairs are left, they stay.

    Args:
        order: int [pairs], of one epoch.
        keys: int [pairs, K]; no value of one column occurs in another.
    """
    result = array("i")
    waiting: list[tuple[int, list[int]]] = []
    coming = _with_keys(order, keys)
    while len(result) < len(order):
        met: set[int] = set()
        still_waiting = []
        chosen = 0
        for pair, row in itertools.chain(waiting, coming):
            if met.isdisjoint(row):
                met.update(row)
                result.append(pair)
                chosen += 1
            else:
                still_waiting.append((pair, row))
            if chosen == batch:
                break
        else:  # nothing more is coming: what clashes fills the rest
            result.extend(pair for pair, _ in still_waiting)
            break
        untouched = waiting[chosen + len(still_waiting) :]
        waiting = still_waiting + untouched
    return np.asarray(result)


def _with_keys(order: np.ndarray, keys: np.ndarray) -> Iterator[tuple[int, list[int]]]:
    """(pair, its keys) in this order, looked up piece by piece: as objects all of them would take gigabytes."""
    for start in range(0, len(order), 4096):
        piece = order[start : start + 4096]
        yield from zip(piece.tolist(), keys[piece].tolist(), strict=True)


class EpochLoader(DataLoader):
    """A DataLoader that hands the epoch on to its sampler and its data set; the Trainer calls `set_epoch`."""

    def set_epoch(self, epoch: int) -> None:
        self.batch_sampler.set_epoch(epoch)
        self.dataset.set_epoch(epoch)


def one_thread(_worker: int) -> None:
    """A loader worker decodes with one thread: more of them only fight over the cores."""
    torch.set_num_threads(1)
