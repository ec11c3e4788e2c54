"""Image-caption pairs: where each picture is, the captions, the items of training.

A picture is listed once however many captions it has. Reading follows the one rule of the repo: what a sample looks
like depends on its index alone, so the number of loader workers and a resume change nothing. All that there is one of
for each pair lies in arrays: a list of Python objects would be copied to every worker as it is read.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch.utils.data import Dataset

from clip_pretraining.data import remote
from clip_pretraining.data.images import ImageError, decode_image
from clip_pretraining.data.left_out import Fault
from clip_pretraining.data.texts import Texts, first_equal
from clip_pretraining.data.tokenization import PackedCaptions, pad_captions


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


class Pictures(Sequence[ImageRef]):
    """Where pictures are: each in a file of its own below `root`, or many in a tar.

    Args:
        files: names of the pictures' files, or of the tars.
        file_of: int32 [pictures], the tar of each; None: a file each.
        offset, length: int64 [pictures], where in the tar.
    """

    def __init__(
        self,
        files: Texts,
        root: str = "",
        file_of: np.ndarray | None = None,
        offset: np.ndarray | None = None,
        length: np.ndarray | None = None,
    ):
        self.files, self.root = files, root
        self.file_of, self.offset, self.length = file_of, offset, length

    @classmethod
    def of(cls, refs: Iterable[ImageRef]) -> Pictures:
        if isinstance(refs, cls):
            return refs
        refs = list(refs)
        files = Texts.of(dict.fromkeys(ref.path for ref in refs))
        place = {path: i for i, path in enumerate(files)}
        places = np.array([(place[ref.path], ref.offset, ref.length) for ref in refs], dtype=np.int64).reshape(-1, 3)
        return cls(files, "", places[:, 0].astype(np.int32), places[:, 1], places[:, 2])

    def __len__(self) -> int:
        return len(self.files if self.file_of is None else self.file_of)

    def __getitem__(self, index):
        """One picture, or the list of a slice."""
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if self.file_of is None:
            return ImageRef(relative_to(self.root, self.files[index]))
        path = relative_to(self.root, self.files[int(self.file_of[index])])
        return ImageRef(path, int(self.offset[index]), int(self.length[index]))

    def take(self, positions: np.ndarray) -> Pictures:
        if self.file_of is None:
            return Pictures(self.files.take(positions), self.root)
        return Pictures(self.files, self.root, self.file_of[positions], self.offset[positions], self.length[positions])


@dataclass
class Pairs:
    """A split: pictures, captions, and which picture each caption describes (in the order of the source)."""

    name: str
    images: Pictures  # or any sequence of ImageRef
    captions: Texts  # or any sequence of str
    image_of_caption: np.ndarray  # int32 [captions]
    image_keys: Texts = field(default_factory=list)  # short names for reports; defaults to the file names
    left_out: list[Fault] = field(default_factory=list)  # samples of the source that are none of these
    samples: int = 0  # of the source, those left out among them
    starts: np.ndarray = field(default_factory=lambda: np.zeros(1, np.int64))  # first caption of each of its parts

    def __post_init__(self):
        self.images, self.captions = Pictures.of(self.images), Texts.of(self.captions)
        self.image_of_caption = np.asarray(self.image_of_caption, dtype=np.int32)
        self.image_keys = Texts.of(self.image_keys or (os.path.basename(image.name) for image in self.images))
        self.samples = self.samples or len(self) + len(self.left_out)

    def __len__(self) -> int:
        return len(self.captions)

    def place(self, image: int) -> str:
        """A picture in a list: its name, in which tar."""
        tar = f"{self.images[image].path}: " if self.images.file_of is not None else ""
        return f"{tar}{self.image_keys[image]}"

    def columns(self) -> dict[str, np.ndarray]:
        """All of it as arrays, without the name."""
        images = self.images
        columns = {"image_of_caption": self.image_of_caption, "samples": np.array(self.samples), "starts": self.starts}
        if images.file_of is not None:
            columns |= {"file_of": images.file_of, "offset": images.offset, "length": images.length}
        texts = {
            "captions": self.captions,
            "keys": self.image_keys,
            "files": images.files,
            "root": Texts.of([images.root]),
            "causes": Texts.of(fault.cause for fault in self.left_out),
            "places": Texts.of(fault.where for fault in self.left_out),
        }
        if images.files is self.image_keys:
            del texts["files"]  # once is enough
        for name, packed in texts.items():
            columns |= {name: packed.data, f"{name}_ends": packed.ends}
        return columns

    @classmethod
    def of_columns(cls, name: str, columns: dict[str, np.ndarray]) -> Pairs:
        """What `columns` took apart."""
        texts = {key: Texts(columns[key], columns[f"{key}_ends"]) for key in columns if f"{key}_ends" in columns}
        root, places = texts["root"][0], (columns.get(key) for key in ("file_of", "offset", "length"))
        return cls(
            name,
            Pictures(texts.get("files", texts["keys"]), root, *places),
            texts["captions"],
            columns["image_of_caption"],
            texts["keys"],
            [Fault(*fault) for fault in zip(texts["causes"], texts["places"], strict=True)],
            int(columns["samples"]),
            columns["starts"],
        )

    def source_sizes(self) -> list[int]:
        """Pairs of each part of the source."""
        return np.diff(np.append(self.starts, len(self))).tolist()

    def head(self, count: int | None) -> Pairs:
        """The first `count` captions and the pictures they describe; all of them when count is None or larger."""
        return self if count is None or count >= len(self) else self.take(np.arange(count))

    def keys(self) -> np.ndarray:
        """Int32 [captions, 2]: which picture, and which text (the same for captions that differ in case only)."""
        texts = first_equal((caption.strip().lower() for caption in self.captions), len(self))
        return np.stack([self.image_of_caption, len(self.images) + texts], axis=1).astype(np.int32)

    def take(self, captions: np.ndarray) -> Pairs:
        """The captions of the given positions, which rise, with only their pictures."""
        used, position = np.unique(self.image_of_caption[captions], return_inverse=True)
        images, keys = self.images.take(used), self.image_keys.take(used)
        if self.images.files is self.image_keys:
            images.files = keys
        return replace(
            self,
            images=images,
            captions=self.captions.take(captions),
            image_of_caption=position,
            image_keys=keys,
            starts=np.searchsorted(captions, self.starts),
        )

    def identity(self) -> dict[str, int | str]:
        """What the split is, by content: the same wherever it lies, another when a caption or picture is another."""
        captions, pictures = hashlib.blake2b(digest_size=8), hashlib.blake2b(digest_size=8)
        for text, image in zip(self.captions, self.image_of_caption, strict=True):
            captions.update(f"{image} {text}\n".encode("utf-8", "surrogatepass"))
        for key, image in zip(self.image_keys, self.images, strict=True):
            pictures.update(f"{key} {image.size()}\n".encode("utf-8", "surrogatepass"))
        return {"pairs": len(self), "captions": captions.hexdigest(), "pictures": pictures.hexdigest()}

    def held_out(self, share: float, keep: bool) -> Pairs:
        """The pairs of about `share` of the pictures, chosen by their names; with `keep` False those of all others."""
        limit = int(share * 2**64)
        digests = (hashlib.blake2b(key.encode("utf-8", "surrogatepass"), digest_size=8) for key in self.image_keys)
        chosen = np.fromiter((int.from_bytes(digest.digest(), "big") < limit for digest in digests), dtype=bool)
        return self.take(np.flatnonzero(chosen[self.image_of_caption] == keep))

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

    def set_epoch(self, epoch: int) -> None:
        """For pictures that are others in every epoch (random_crop.py)."""
        if hasattr(self.images, "set_epoch"):
            self.images.set_epoch(epoch)

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


def relative_to(folder: str | Path, path: str) -> str:
    """`path`, taken from `folder` unless it is absolute or a URL."""
    return path if remote.is_remote(path) else os.path.join(folder, path)
