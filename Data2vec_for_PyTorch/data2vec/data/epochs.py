"""The batches of an epoch on one rank: fairseq's order and shards, for text and images alike."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np
import torch
from omegaconf import DictConfig

from common.errors import UsageError
from data2vec.data.batching import epoch_batches

VALID_EPOCH = 1  # validation masks are those of epoch 1, always


class BrokenSample(ValueError):
    """A sample that cannot be used; the message names its file and what to do."""


class Samples(Protocol):
    """A split's samples; what a batch holds depends on their indices and the epoch alone."""

    def collate(self, indices: np.ndarray, epoch: int) -> Any:
        """A batch of them. Raises BrokenSample."""

    def identity(self) -> dict[str, Any]:
        """What they are, in plain values."""


class EpochBatches(torch.utils.data.Dataset):
    """The batches of one epoch on one rank, by position: what a loader worker makes does not depend on which it is."""

    def __init__(self, data: Samples, batches: list[np.ndarray], epoch: int, rows: list[int]):
        super().__init__()
        self.data = data
        self.batches = batches
        self.epoch = epoch
        self.rows = rows  # of each position's batches over all ranks, so that nobody has to ask a device

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, position: int) -> Any:
        return self.data.collate(self.batches[position], self.epoch)

    def loader(self, num_workers: int) -> Iterator[Any]:
        """The batches in order, made by that many processes. UsageError for a sample that cannot be used."""
        loader = torch.utils.data.DataLoader(self, batch_size=None, num_workers=num_workers, shuffle=False)
        try:
            yield from loader
        except BrokenSample as error:  # a worker's has its traceback in front of the message
            raise UsageError(str(error).strip().splitlines()[-1].rpartition("BrokenSample: ")[2]) from None


class SplitBatches:
    """Splits and their batch plans; a subclass says what a split holds (`open_split`).

    Attributes:
        places: folders of training data, of which each epoch takes the next.
        notes: what the log should say about the data.
    """

    def __init__(self, config: DictConfig, rank: int = 0, world_size: int = 1, places: int = 1):
        self.config = config
        self.rank, self.world_size = rank, world_size
        self.places = places
        self.notes: list[str] = []
        self._splits: dict[tuple[str, int], tuple[Samples, list[np.ndarray]]] = {}

    def open_split(self, name: str, training: bool, place: int) -> tuple[Samples, list[np.ndarray]]:
        """The split's samples and its batches, before shuffling and sharding. UsageError when there are none."""
        raise NotImplementedError

    def split(self, name: str, training: bool, epoch: int = 1) -> tuple[Samples, list[np.ndarray]]:
        """`open_split`, once for each place."""
        place = (epoch - 1) % self.places if training else 0
        if (name, place) not in self._splits:
            self._splits[name, place] = self.open_split(name, training, place)
        return self._splits[name, place]

    def open_splits(self) -> None:
        """Opens what training will need, so that a missing or damaged split stops the run before it begins.

        Raises:
            UsageError: all that is wrong with any split.
        """
        dataset, problems = self.config.dataset, []
        needed = [(dataset.train_subset, True, place + 1) for place in range(self.places)]
        if not dataset.disable_validation:
            needed += [(name, False, 1) for name in dataset.valid_subset.split(",")]
        for name, training, epoch in needed:
            try:
                self.split(name, training=training, epoch=epoch)
            except UsageError as error:
                problems.append(str(error))
        if problems:
            raise UsageError("; ".join(problems))

    def train_batches(self, epoch: int, start: int = 0) -> EpochBatches:
        """This rank's training batches of an epoch, from position `start` on."""
        data, batches = self.split(self.config.dataset.train_subset, training=True, epoch=epoch)
        return self._own(data, batches, epoch, self.config.common.seed, start=start)

    def any_training_batch(self) -> Any:
        """The first of the first epoch's plan, on any rank."""
        data, batches = self.split(self.config.dataset.train_subset, training=True)
        return data.collate(batches[0], 1)

    def batches_per_epoch(self, epoch: int) -> int:
        _, batches = self.split(self.config.dataset.train_subset, training=True, epoch=epoch)
        return -(-len(batches) // self.world_size)

    def valid_batches(self, name: str) -> EpochBatches:
        """This rank's batches of a validation split: in the plan's order, with the same masks every time."""
        data, batches = self.split(name, training=False)
        stop = self.config.dataset.max_valid_steps or None
        return self._own(data, batches, VALID_EPOCH, seed=0, shuffle=False, stop=stop)

    def identity(self) -> dict[str, Any]:
        """What the training data is, in plain values that do not depend on where it lies."""
        name = self.config.dataset.train_subset
        places = [self.split(name, training=True, epoch=place + 1)[0].identity() for place in range(self.places)]
        return places[0] if len(places) == 1 else {f"folder {i}": place for i, place in enumerate(places)}

    def _own(self, data, batches, epoch: int, seed: int, shuffle=True, start=0, stop=None) -> EpochBatches:
        size = self.world_size
        order = epoch_batches(batches, seed, epoch, shuffle=shuffle)
        own = epoch_batches(order, 0, 0, size, self.rank, shuffle=False)
        rows = [sum(map(len, order[i : i + size])) for i in range(0, len(order), size)]
        return EpochBatches(data, own[start:stop], epoch, rows[start:stop])
