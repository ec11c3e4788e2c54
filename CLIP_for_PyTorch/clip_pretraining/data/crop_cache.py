"""Decoded crops on disk, for hosts whose CPUs cannot decode as fast as the accelerator trains.

One file of fixed-size records (uint8 [3, S, S]) and one of keys, both mapped into memory. A record counts only when its
key is the picture's (path, size, modification time) and its checksum is that of its bytes: a changed picture, a record
half written by a process that died, and two processes writing at once all end in a decode, never in wrong pixels.
Crops are the same from epoch to epoch, since the pipeline draws nothing at random.
"""

from __future__ import annotations

import errno
import hashlib
import os
import zlib
from pathlib import Path

import numpy as np
import torch

from clip_pretraining.data.pairs import DecodedImages
from clip_pretraining.data.picture_check import file_stamp
from common.errors import UsageError

_PIXELS = 2  # of decode_image: another number where it gives other pixels, so that no old crop counts
_KEY = np.dtype([("picture", "<u8"), ("checksum", "<u4"), ("unused", "<u4")])


class CropCache:
    """The pictures of `source`, from the cache where it has them, decoded and added to it where not.

    Args:
        folder: where the cache lives; made when absent.
        name: of the split; one pair of files each.
        source: decodes a picture when it is not there yet.

    Raises:
        UsageError: the folder cannot be written, or its disk has not the room. The space is taken at the start, so that
            a full disk shows here and not as a crash in mid-epoch.
    """

    def __init__(self, folder: Path, name: str, source: DecodedImages):
        self.source = source
        size = source.size
        record = 3 * size * size
        stem = folder / f"{name}_{size}_{len(source)}"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            _reserve(stem.with_suffix(".crops"), record * len(source))
            _reserve(stem.with_suffix(".keys"), _KEY.itemsize * len(source))
        except OSError as error:
            needed = (record + _KEY.itemsize) * len(source) >> 20
            reason = "no room" if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) else error.strerror
            raise UsageError(f"--crop_cache {folder}: {reason}; {needed} MiB are needed") from None
        self._crops = np.memmap(stem.with_suffix(".crops"), np.uint8, "r+", shape=(len(source), 3, size, size))
        self._keys = np.memmap(stem.with_suffix(".keys"), _KEY, "r+", shape=(len(source),))

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> torch.Tensor:
        """The picture, uint8 [3, S, S]."""
        ref, key = self.source.images[index], self._keys[index]
        picture = _picture_key(ref.name, file_stamp(ref.path))
        if key["picture"] == picture:
            crop = np.array(self._crops[index])  # a copy: what is checked is what is returned
            if zlib.crc32(crop) == key["checksum"]:
                return torch.from_numpy(crop)
        crop = self.source[index]
        self._crops[index] = crop.numpy()
        self._keys[index] = (picture, zlib.crc32(crop.numpy()), 0)
        return crop


def _reserve(path: Path, size: int) -> None:
    """Makes the file that long and takes its space on the disk, keeping what it holds."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        os.posix_fallocate(descriptor, 0, max(size, 1))
    finally:
        os.close(descriptor)


def _picture_key(name: str, stamp: str) -> int:
    """Never 0, which is what a fresh file is filled with."""
    digest = hashlib.blake2b(f"{_PIXELS} {name} {stamp}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") or 1
