"""Which pictures a rank takes in which step: a function of (seed, step, rank), for every number of loader workers."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from common.device import mix_seed, pins_memory
from common.distributed import World
from common.errors import UsageError


class EpochBatches:
    """Batch sampler over all epochs from a given batch on: lists of (epoch, index) for one rank.

    Every epoch is a permutation drawn from (seed, epoch); rank r takes every size-th entry of its first
    batches_per_epoch * batch_size * size. So a resumed run sees what the first would have seen, in any number of loader
    workers, and no epoch has more batches than the schedules know of (the reference's last one can).
    """

    def __init__(
        self,
        count: int,
        batch_size: int,
        world: World,
        batches_per_epoch: int,
        seed: int,
        start: int,
        stop: int,
    ):
        self.count, self.batch_size, self.rank, self.size = count, batch_size, world.rank, world.size
        self.batches_per_epoch, self.seed, self.start, self.stop = batches_per_epoch, seed, start, stop
        self._drawn, self._order_of_epoch = -1, []

    def __len__(self) -> int:
        return max(0, self.stop - self.start)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        return map(self.batch, range(self.start, self.stop))

    def batch(self, number: int) -> list[tuple[int, int]]:
        """The batch of that number, counted over all epochs."""
        epoch, batch = divmod(number, self.batches_per_epoch)
        if epoch != self._drawn:
            self._order_of_epoch, self._drawn = self._order(epoch), epoch
        mine = self._order_of_epoch[batch * self.batch_size : (batch + 1) * self.batch_size]
        return [(epoch, index) for index in mine]

    def _order(self, epoch: int) -> list[int]:
        generator = torch.Generator().manual_seed(mix_seed(self.seed, epoch))
        return torch.randperm(self.count, generator=generator)[self.rank :: self.size].tolist()


def steps_per_epoch(count: int, batch_size: int, size: int, update_freq: int = 1) -> int:
    """Optimizer steps of an epoch; what does not fill a step is left out.

    Raises:
        UsageError: not even one step.
    """
    samples = batch_size * size * update_freq
    if count < samples:
        raise UsageError(
            f"{count} pictures are fewer than one step takes: --batch_size {batch_size} x {size} ranks x "
            f"--update_freq {update_freq} = {samples}"
        )
    return count // samples


class RunBatches:
    """Iterator over a rank's micro-batches, which also knows whose they are."""

    def __init__(self, loader: DataLoader, sampler: EpochBatches, update_freq: int):
        self.dataset, self.sampler, self.update_freq = loader.dataset, sampler, update_freq
        self._batches = iter(loader)

    def __iter__(self) -> RunBatches:
        return self

    def __next__(self) -> Any:
        return next(self._batches)

    def names(self, step: int) -> SampleNames:
        """The files of this rank's pictures in an optimizer step, counted from 0 over the run."""
        return SampleNames(self, range(step * self.update_freq, (step + 1) * self.update_freq))


class SampleNames:
    """Names that are looked up when somebody asks."""

    def __init__(self, batches: RunBatches, numbers: range):
        self.batches, self.numbers = batches, numbers

    def __iter__(self) -> Iterator[str]:
        for number in self.numbers:
            for _, index in self.batches.sampler.batch(number):
                yield str(self.batches.dataset.paths[index])


def run_batches(
    dataset: Dataset,
    options: argparse.Namespace,
    world: World,
    steps: int,
    start: int,
    stop: int,
    collate_fn: Callable | None = None,
) -> RunBatches:
    """Micro-batches of this rank from optimizer step `start` to `stop`, epochs having `steps` of them.

    One loader for the whole run: its workers live through all epochs and fetch across their borders.
    """
    count = options.update_freq
    limits = (start * count, stop * count)
    sampler = EpochBatches(len(dataset), options.batch_size, world, steps * count, options.seed, *limits)
    workers = {"persistent_workers": True, "prefetch_factor": 4} if options.num_workers > 0 else {}
    loader = DataLoader(
        dataset,
        batch_sampler=sampler,
        num_workers=options.num_workers,
        pin_memory=options.pin_mem and pins_memory(world.device),
        collate_fn=collate_fn,
        **workers,
    )
    return RunBatches(loader, sampler, count)
