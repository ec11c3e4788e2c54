"""Image-caption pairs in memory: where each picture is, the packed captions, the batches made of them.

A picture is listed once however many captions it has. Reading follows the one rule of the repo: what a sample looks
like depends on its index alone, so the number of loader workers and a resume change nothing.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from clip_pretraining.data import remote
from clip_pretraining.data.images import ImageError, decode_image
from clip_pretraining.data.left_out import Fault
from clip_pretraining.data.tokenization import PackedCaptions, pad_captions
from common.device import mix_seed


@dataclass(frozen=True)
class ImageRef:
    """A picture: a whole file, or `length` bytes at `offset` of a tar, which may lie behind a URL."""

    path: str
    offset: int = 0
    length: int = -1

    @property
    def name(self) -> str:
        return self.path if self.length < 0 else f"{self.path}@{self.offset}"

    def size(self) -> int:
        """Its bytes; -1 when the file is not there."""
        if self.length >= 0:
            return self.length
        with contextlib.suppress(OSError):
            return os.stat(self.path).st_size
        return -1

    def read(self) -> bytes:
        """The picture's bytes.

        Raises:
            ImageError: no such file, or a server that does not answer.
        """
        try:
            if remote.is_remote(self.path):
                return remote.read_range(self.path, self.offset, self.length)
            with open(self.path, "rb") as file:
                file.seek(self.offset)
                return file.read(self.length)
        except OSError as error:
            raise ImageError(f"{self.name}: {error.strerror or error}") from None


@dataclass
class Pairs:
    """A split: pictures, captions, and which picture each caption describes (in the order of the annotation file)."""

    name: str
    images: list[ImageRef]
    captions: list[str]
    image_of_caption: np.ndarray  # int64 [captions]
    image_keys: list[str] = field(default_factory=list)  # short names for reports; defaults to the file names
    left_out: list[Fault] = field(default_factory=list)  # samples of the source that are none of these

    def __post_init__(self):
        self.image_of_caption = np.asarray(self.image_of_caption, dtype=np.int64)
        if not self.image_keys:
            self.image_keys = [os.path.basename(image.name) for image in self.images]

    def __len__(self) -> int:
        return len(self.captions)

    def head(self, count: int | None) -> Pairs:
        """The first `count` captions and the pictures they describe; all of them when count is None or larger."""
        return self if count is None or count >= len(self) else self.take(np.arange(count))

    def keys(self) -> np.ndarray:
        """Int [captions, 2]: which picture, and which text (the same for captions that differ in case only)."""
        texts: dict[str, int] = {}
        same = [texts.setdefault(caption.strip().lower(), len(texts)) for caption in self.captions]
        return np.stack([self.image_of_caption, len(self.images) + np.array(same, dtype=np.int64)], axis=1)

    def take(self, captions: np.ndarray) -> Pairs:
        """The captions of the given positions, in that order, with only their pictures."""
        used, position = np.unique(self.image_of_caption[captions], return_inverse=True)
        return Pairs(
            self.name,
            [self.images[i] for i in used],
            [self.captions[i] for i in captions],
            position,
            [self.image_keys[i] for i in used],
            self.left_out,
        )

    def identity(self) -> dict[str, int | str]:
        """What the split is, by content: the same wherever it lies, another when a caption or picture is another."""
        captions, pictures = hashlib.blake2b(digest_size=8), hashlib.blake2b(digest_size=8)
        for text, image in zip(self.captions, self.image_of_caption.tolist(), strict=True):
            captions.update(f"{image} {text}\n".encode("utf-8", "surrogatepass"))
        for key, image in zip(self.image_keys, self.images, strict=True):
            pictures.update(f"{key} {image.size()}\n".encode("utf-8", "surrogatepass"))
        return {"pairs": len(self), "captions": captions.hexdigest(), "pictures": pictures.hexdigest()}

    def without_images(self, bad: Sequence[int]) -> Pairs:
        """Without these pictures and their captions."""
        if not len(bad):
            return self
        return self.take(np.flatnonzero(~np.isin(self.image_of_caption, np.asarray(bad))))


class ImageSource(Protocol):
    """Anything that yields the square uint8 picture of a position: the files themselves or the crop cache."""

    def __getitem__(self, index: int) -> torch.Tensor: ...

    def __len__(self) -> int: ...


class DecodedImages(Dataset):
    """Pictures decoded when asked for: uint8 [3, size, size]."""

    def __init__(self, images: Sequence[ImageRef], size: int):
        self.images = images
        self.size = size

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> torch.Tensor:
        ref = self.images[index]
        return decode_image(ref.read(), self.size, ref.name)


class PairDataset(Dataset):
    """Items of training: the picture and the token ids of one caption."""

    def __init__(self, pairs: Pairs, tokens: PackedCaptions, images: ImageSource):
        self.pairs = pairs
        self.tokens = tokens
        self.images = images

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor | np.ndarray | int]:
        picture = self.images[int(self.pairs.image_of_caption[index])]
        return {"pixel_values": picture, "tokens": self.tokens[index], "row": index}

    def name(self, index: int) -> str:
        """A pair in words, for messages: its picture, and how its caption begins."""
        return f"{self.pairs.image_keys[self.pairs.image_of_caption[index]]} {self.pairs.captions[index][:40]!r}"


@dataclass(frozen=True)
class Collate:
    """Items to a batch: pixel_values uint8 [B, 3, S, S], input_ids and attention_mask int64 [B, L], rows of the split.

    With `caption_ids` also those, int64 [B]: equal where captions are, whatever the padding of their batch.
    """

    pad_token_id: int
    max_length: int
    caption_ids: bool = False

    def __call__(self, items: Sequence[dict]) -> dict[str, torch.Tensor]:
        rows = [item["tokens"] for item in items]
        batch = {
            "pixel_values": torch.stack([item["pixel_values"] for item in items]),
            **pad_captions(rows, self.pad_token_id, self.max_length),
            "rows": torch.tensor([item["row"] for item in items]),
        }
        if self.caption_ids:
            digests = [hashlib.blake2b(row.tobytes(), digest_size=8).digest() for row in rows]
            batch["caption_ids"] = torch.tensor([int.from_bytes(d, "little", signed=True) for d in digests])
        return batch


class GlobalBatchSampler(Sampler):
    """Batches of one rank out of the global batches of an epoch.

    The order is a permutation drawn from (seed, epoch). Rank r takes the r-th share of every global batch, so that the
    same pairs meet in a step on any number of ranks. Without `drop_last` a ragged last global batch is shared out
    evenly, which leaves out fewer than `world` pairs.

    `keys` int [pairs, K]: pairs that share a key (the picture, the caption) are no negatives of each other, so they are
    kept out of one global batch for as long as there are others to take.
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
    ):
        self.pairs, self.batch, self.seed, self.rank, self.world = pairs, batch, seed, rank, world
        self.keys = keys
        tail = pairs % (batch * world) // world
        self.tail = 0 if drop_last else tail
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.pairs // (self.batch * self.world) + (self.tail > 0)

    def __iter__(self) -> Iterator[list[int]]:
        order = np.random.default_rng(mix_seed(self.seed, self.epoch)).permutation(self.pairs)
        if self.keys is not None:
            order = apart(order, self.keys, self.batch * self.world)
        whole = self.pairs // (self.batch * self.world)
        for step in range(len(self)):
            share = self.batch if step < whole else self.tail
            start = step * self.batch * self.world + self.rank * share
            yield order[start : start + share].tolist()


def apart(order: np.ndarray, keys: np.ndarray, batch: int) -> np.ndarray:
    """`order` changed so that, in each run of `batch` pairs, none shares a key with another.

    A pair that would clash waits for the next run. Towards the end, where only clashing pairs are left, they stay.

    Args:
        order: int [pairs], a permutation.
        keys: int [pairs, K]; no value of one column occurs in another.
    """
    result: list[int] = []
    waiting, coming = [], iter(order.tolist())
    rows = keys.tolist()
    while len(result) < len(order):
        met: set[int] = set()
        still_waiting = []
        chosen = 0
        for pair in itertools.chain(waiting, coming):
            if met.isdisjoint(rows[pair]):
                met.update(rows[pair])
                result.append(pair)
                chosen += 1
            else:
                still_waiting.append(pair)
            if chosen == batch:
                break
        else:  # nothing more is coming: what clashes fills the rest
            return np.array(result + still_waiting)
        untouched = waiting[chosen + len(still_waiting) :]
        waiting = still_waiting + untouched
    return np.array(result)


class EpochLoader(DataLoader):
    """A DataLoader that hands the epoch on to its sampler; the Trainer calls `set_epoch`."""

    def set_epoch(self, epoch: int) -> None:
        self.batch_sampler.set_epoch(epoch)


def one_thread(_worker: int) -> None:
    """A loader worker decodes with one thread: more of them only fight over the cores."""
    torch.set_num_threads(1)


def unreadable_images(
    images: Sequence[ImageRef], workers: int, rank: int = 0, ranks: int = 1, say: Callable[[str], None] = print
) -> dict[int, str]:
    """Decodes every picture once and says what is wrong with which; a header alone does not show a truncated file.

    Args:
        rank, ranks: each of `ranks` processes looks at its share.
        say: told of the progress, every half a minute.

    Returns:
        {position: reason} of those of the share that cannot be read.
    """
    mine = range(rank, len(images), ranks)
    loader = DataLoader(_Check(images, mine), batch_size=None, num_workers=workers, worker_init_fn=one_thread)
    bad, last = {}, time.monotonic()
    for done, (index, reason) in enumerate(zip(mine, loader, strict=True), 1):
        if reason:
            bad[index] = reason
        if time.monotonic() - last > 30:
            last = time.monotonic()
            say(f"checking pictures: {done:,} of {len(mine):,}, {len(bad)} cannot be read")
    return bad


class _Check(Dataset):
    def __init__(self, images: Sequence[ImageRef], mine: Sequence[int]):
        self.images, self.mine = images, mine

    def __len__(self) -> int:
        return len(self.mine)

    def __getitem__(self, index: int) -> str:
        ref = self.images[self.mine[index]]
        try:
            decode_image(ref.read(), 8, ref.name)
        except ImageError as error:
            return str(error)
        return ""


def relative_to(folder: Path, path: str) -> str:
    """`path`, taken from `folder` unless it is absolute."""
    return path if os.path.isabs(path) else str(folder / path)
