"""Pairs from WebDataset tars, on local disks or behind http(s) URLs: KEY.jpg beside KEY.txt.

Only headers and captions are read at the start; a picture is later read straight out of its tar by offset, from a URL
by a range of bytes. That keeps random order, exact resume and equal batches on all ranks, which a stream of shards has
none of, and a set need not fit on any disk here. The tars must be plain (not gzipped).
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import json
import os
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np

from clip_pretraining.data import remote
from clip_pretraining.data.pairs import ImageRef, Pairs
from clip_pretraining.data.tables import IMAGE_SUFFIXES, drop_empty_captions, keep_json
from common import distributed
from common.errors import UsageError

Sample = tuple[str, int, int, str]  # key, offset and length of the picture in the tar, caption


def read_shards(pattern: str, caption_key: str = "txt", index_dir: Path | None = None) -> Pairs:
    """Pairs of all tars that `pattern` names, in the order of the names.

    Args:
        pattern: as `expand_shards`.
        caption_key: suffix of the captions' members.
        index_dir: where the contents of remote tars are kept, which are otherwise downloaded once to be listed.

    Raises:
        UsageError: a tar that is missing, compressed or damaged, or no pairs in them.
    """
    refs: list[ImageRef] = []
    captions: list[str] = []
    keys: list[str] = []
    for shard in expand_shards(pattern):
        for key, offset, length, caption in _samples_of(shard, caption_key, index_dir):
            refs.append(ImageRef(shard, offset, length))
            captions.append(caption)
            keys.append(key)
    if not refs:
        raise UsageError(f"{pattern}: no picture in it (KEY.jpg beside KEY.{caption_key})")
    return drop_empty_captions(Pairs("shards", refs, captions, np.arange(len(refs)), keys), pattern)


def expand_shards(pattern: str) -> list[str]:
    """WebDataset's shard notation: `a-{0000..0100}.tar`, several joined by `::`; for files also shell wildcards."""
    shards: list[str] = []
    for part in pattern.split("::"):
        if part.startswith("pipe:"):
            raise UsageError(f"{part}: no commands are run; give files or http(s) URLs of tars")
        for name in _expand_range(part):
            if re.search(r"\.(tgz|tar\.\w+)$", name.partition("?")[0]):
                raise UsageError(
                    f"{name}: compressed; pictures are read out of a tar by their offset, so decompress it first "
                    "(JPEGs hardly shrink anyway)"
                )
            found = sorted(glob.glob(name)) if glob.has_magic(name) and not remote.is_remote(name) else [name]
            if not found or not all(remote.is_remote(f) or os.path.isfile(f) for f in found):
                raise UsageError(f"--train_shards/--validation_shards {part}: no such file {name}")
            shards += found
    return shards


def _expand_range(part: str) -> list[str]:
    match = re.search(r"\{(\d+)\.\.(\d+)\}", part)
    if match is None:
        return [part]
    first, last = match.groups()
    numbers = [f"{n:0{len(first)}d}" for n in range(int(first), int(last) + 1)]
    return [whole for n in numbers for whole in _expand_range(part[: match.start()] + n + part[match.end() :])]


def _samples_of(shard: str, caption_key: str, index_dir: Path | None) -> list[Sample]:
    if not remote.is_remote(shard):
        with _explained(shard), tarfile.open(shard, "r:") as tar:
            return list(_samples(tar, caption_key))
    if index_dir is None:
        raise UsageError(f"{shard}: give --cache_dir, where the contents of remote tars are kept")
    # one rank downloads, the others are told
    found = _remote_samples(shard, caption_key, index_dir) if distributed.rank() == 0 else None
    return [tuple(sample) for sample in distributed.broadcast_object(found)]


def _remote_samples(shard: str, caption_key: str, index_dir: Path) -> list[Sample]:
    digest = hashlib.blake2b(f"{shard} {remote.version(shard)} {caption_key}".encode(), digest_size=12).hexdigest()
    index = index_dir / f"shard_{digest}.json"
    if index.is_file():
        return json.loads(index.read_text())

    def listed(file: BinaryIO) -> list[Sample]:
        with tarfile.open(fileobj=file, mode="r|") as tar:
            return list(_samples(tar, caption_key))

    print(f"listing {shard}", flush=True)
    with _explained(shard):
        samples = remote.read_stream(shard, listed)
    keep_json(index, samples, f"the contents of {shard}")
    return samples


def _samples(tar: tarfile.TarFile, caption_key: str) -> Iterator[Sample]:
    """One for each key with a picture; its caption is empty where there is none. A key's members lie side by side."""
    current, picture, caption = None, None, ""
    for member in tar:
        if not member.isfile():
            continue
        folder, _, name = member.name.rpartition("/")
        stem, _, suffix = name.partition(".")
        key = f"{folder}/{stem}" if folder else stem
        if key != current:
            if picture is not None:
                yield current, *picture, caption
            current, picture, caption = key, None, ""
        if suffix.lower() in IMAGE_SUFFIXES:
            picture = (member.offset_data, member.size)
        elif suffix == caption_key:
            caption = tar.extractfile(member).read().decode("utf-8")
    if picture is not None:
        yield current, *picture, caption


@contextlib.contextmanager
def _explained(shard: str) -> Iterator[None]:
    """Errors of reading a tar, as one that names it."""
    try:
        yield
    except (tarfile.TarError, EOFError, OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{shard}: not a readable, uncompressed tar of UTF-8 captions ({error})") from None
