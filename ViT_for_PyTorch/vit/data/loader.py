"""Batches of uint8 pictures in an order that depends on (seed, epoch) alone, from any step of an epoch on.

Which pictures a step sees, and how each is augmented, depend neither on the number of workers nor on the number of
ranks: rank r of R takes the r-th part of each global batch.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from common.device import mix_seed, step_generator
from common.errors import UsageError
from vit.data.augment import MEAN, STD, Erasure, EvalTransform, TrainTransform, erase, normalise
from vit.data.image_folder import BadFiles, BrokenImage, ImageFolder, read_image
from vit.model.vision_transformer import ViTConfig

PREFETCHED_BATCHES = 4  # per worker
REPLACEMENTS = 20  # broken pictures in a row before giving up
_ERASING_NOISE = 1  # marks the noise's seed apart from the seed of the sample's other draws

BadFile = tuple[str, str]  # path, reason
Key = tuple[int, int]  # epoch, index into the folder


class Batch(NamedTuple):
    """What a loader yields."""

    images: Tensor  # uint8 [B, 3, S, S]; channels last in memory
    targets: Tensor  # int64 [B]
    bad_files: tuple[BadFile, ...]  # broken pictures met, whose places others have taken
    erasures: tuple[Erasure, ...]  # boxes that `to_model_input` fills with noise
    paths: tuple[str, ...] = ()  # of the pictures, in their order


def to_model_input(batch: Batch, device: torch.device, model: ViTConfig | None = None) -> tuple[Tensor, Tensor]:
    """The batch on the device, normalised for a model and erased there: float32 [B, 3, S, S] and int64 [B]."""
    mean, std = (MEAN, STD) if model is None else (model.mean, model.std)
    images = normalise(batch.images.to(device, non_blocking=True), mean, std)
    return erase(images, batch.erasures), batch.targets.to(device, non_blocking=True)


class _Sample(NamedTuple):
    pixels: np.ndarray  # uint8 [S, S, 3]
    target: int
    bad_files: list[BadFile]
    erasure: Erasure | None
    path: str


class _TrainPictures(Dataset):
    def __init__(self, folder: ImageFolder, transform: TrainTransform, seed: int):
        self.folder, self.transform, self.seed = folder, transform, seed

    def __getitem__(self, key: Key) -> _Sample:
        epoch, index = key
        bad_files: list[BadFile] = []
        for attempt in range(REPLACEMENTS):
            chosen = index if attempt == 0 else mix_seed(self.seed, epoch, index, attempt) % len(self.folder)
            try:
                pixels = read_image(self.folder.paths[chosen])
            except BrokenImage as error:
                bad_files.append((self.folder.paths[chosen], str(error)))
                continue
            pixels, box = self.transform(pixels, mix_seed(self.seed, epoch, index))
            noise_seed = mix_seed(self.seed, epoch, index, 0, _ERASING_NOISE)
            erasure = None if box is None else Erasure(0, box, noise_seed)
            return _Sample(pixels, self.folder.targets[chosen], bad_files, erasure, self.folder.paths[chosen])
        raise ValueError(f"{REPLACEMENTS} broken pictures in a row, the last: {bad_files[-1][1]}")


class _EvalPictures(Dataset):
    def __init__(self, folder: ImageFolder, transform: EvalTransform):
        self.folder, self.transform = folder, transform

    def __getitem__(self, key: Key) -> _Sample:
        _, index = key
        try:
            pixels, bad_files = read_image(self.folder.paths[index]), []
        except BrokenImage as error:  # the loader raises it: from a worker it would come wrapped in a traceback
            pixels, bad_files = np.zeros((1, 1, 3), np.uint8), [(self.folder.paths[index], str(error))]
        return _Sample(self.transform(pixels), self.folder.targets[index], bad_files, None, self.folder.paths[index])


def _collate(samples: Sequence[_Sample]) -> Batch:
    images = torch.from_numpy(np.stack([sample.pixels for sample in samples]))  # [B, S, S, 3]
    erasures = (
        Erasure(row, sample.erasure.box, sample.erasure.seed)
        for row, sample in enumerate(samples)
        if sample.erasure is not None
    )
    return Batch(
        images.permute(0, 3, 1, 2),  # [B, 3, S, S]; the copy into planes is left to the device
        torch.tensor([sample.target for sample in samples]),
        tuple(bad for sample in samples for bad in sample.bad_files),
        tuple(erasures),
        tuple(sample.path for sample in samples),
    )


class _Batches:
    """The batch sampler: reads `epoch` and `start_step` at each new iteration, so that workers can stay alive."""

    def __init__(self, keys_of_batch):
        self.keys_of_batch, self.epoch, self.start_step, self.steps = keys_of_batch, 0, 0, 0

    def __iter__(self) -> Iterator[list[Key]]:
        yield from self.keys_of_batch(self.epoch, self.start_step)

    def __len__(self) -> int:
        return self.steps - self.start_step


def _data_loader(dataset: Dataset, batches: _Batches, num_workers: int, pin_memory: bool) -> DataLoader:
    return DataLoader(
        dataset,
        batch_sampler=batches,
        num_workers=num_workers,  # torch gives each worker one thread
        collate_fn=_collate,
        pin_memory=pin_memory,
        persistent_workers=num_workers > 0,
        prefetch_factor=PREFETCHED_BATCHES if num_workers > 0 else None,
    )


class TrainLoader:
    """Augmented batches of a folder. `bad_files` has the broken pictures that this rank met and skipped.

    Args:
        batch_size: pictures per batch and rank. Each epoch has `steps_per_epoch` batches on every rank, without the
            remainder of a global batch.
        rank, world_size: this rank's part of each global batch.
        pin_memory: only with an accelerator.

    Raises:
        UsageError: fewer pictures than one global batch.
    """

    def __init__(
        self,
        folder: ImageFolder,
        transform: TrainTransform,
        *,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        num_workers: int = 0,
        pin_memory: bool = False,
    ):
        self.folder, self.seed, self.batch_size = folder, seed, batch_size
        self.rank, self.global_batch = rank, batch_size * world_size
        self.steps_per_epoch = len(folder) // self.global_batch
        if self.steps_per_epoch == 0:
            raise UsageError(
                f"{folder.root} has {len(folder)} pictures, fewer than one global batch of {self.global_batch} "
                f"(batch size {batch_size} x {world_size} ranks): use a smaller batch size"
            )
        self.bad_files = BadFiles(folder)
        self._batches = _Batches(self._keys)
        self._batches.steps = self.steps_per_epoch
        self._loader = _data_loader(_TrainPictures(folder, transform, seed), self._batches, num_workers, pin_memory)

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[Batch]:
        """The batches `start_step`, `start_step` + 1, ... of an epoch.

        ValueError once more than 1 % of the folder's pictures turned out to be broken.
        """
        self._batches.epoch, self._batches.start_step = epoch, start_step
        for batch in self._loader:
            self.bad_files.add(batch.bad_files)
            yield batch

    def _keys(self, epoch: int, start_step: int) -> Iterator[list[Key]]:
        order = torch.randperm(len(self.folder), generator=step_generator(self.seed, epoch)).tolist()
        for step in range(start_step, self.steps_per_epoch):
            first = step * self.global_batch + self.rank * self.batch_size
            yield [(epoch, index) for index in order[first : first + self.batch_size]]


class EvalLoader:
    """Every picture of a folder once over all ranks: rank r has pictures r, r + R, ... (the last batch may be short).

    A broken picture is a `BrokenImage` error that names it: an accuracy over fewer pictures would not be the folder's.
    """

    def __init__(
        self,
        folder: ImageFolder,
        transform: EvalTransform,
        *,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        num_workers: int = 0,
        pin_memory: bool = False,
    ):
        self.folder, self.batch_size = folder, batch_size
        self._indices = range(rank, len(folder), world_size)
        self._most_steps = -(-len(range(0, len(folder), world_size)) // batch_size)  # rank 0 never has fewer
        self._size = transform.size
        self._batches = _Batches(self._keys)
        self._batches.steps = -(-len(self._indices) // batch_size)
        self._loader = _data_loader(_EvalPictures(folder, transform), self._batches, num_workers, pin_memory)

    def __len__(self) -> int:
        return self._batches.steps

    def __iter__(self) -> Iterator[Batch]:
        for batch in self._loader:
            if batch.bad_files:
                raise BrokenImage(batch.bad_files[0][1])
            yield batch

    def of_equal_length(self) -> Iterator[Batch]:
        """As many batches on every rank, the last ones empty: the forward of a sharded model needs all ranks."""
        yield from self
        for _ in range(self._most_steps - len(self)):
            yield Batch(
                torch.zeros(0, 3, self._size, self._size, dtype=torch.uint8), torch.zeros(0, dtype=torch.int64), (), ()
            )

    def _keys(self, epoch: int, start_step: int) -> Iterator[list[Key]]:
        for first in range(0, len(self._indices), self.batch_size):
            yield [(epoch, index) for index in self._indices[first : first + self.batch_size]]
