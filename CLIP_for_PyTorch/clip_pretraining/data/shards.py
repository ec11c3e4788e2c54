"""Pairs from WebDataset tars, on local disks or behind http(s) URLs: KEY.jpg beside KEY.txt.

Only headers and captions are read at the start; a picture is later read straight out of its tar by offset, from a URL
by a range of bytes. That keeps random order, exact resume and equal batches on all ranks, which a stream of shards has
none of, and a set need not fit on any disk here. The tars must be plain (not gzipped).
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import re
import tarfile
import time
from array import array
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from clip_pretraining.data import left_out, remote
from clip_pretraining.data.left_out import drop_bad_captions
from clip_pretraining.data.pairs import Pairs, Pictures, relative_to
from clip_pretraining.data.picture_check import IMAGE_SUFFIXES, keep_json, kept_json
from clip_pretraining.data.texts import GrowingTexts, Texts
from common.data.pictures import is_litter
from common.data.whole_tar import Member
from common.errors import UsageError

MAX_TARS = 1_000_000  # of one pattern
MAX_CAPTION_BYTES = 1 << 20  # of one member: no caption is that long, whatever a header says
Sample = tuple[str, int, int, str]  # key, offset and length of the picture in the tar, caption
Listed = tuple[list[Sample], list[tuple[str, str]]]  # of a tar, with the faults (cause, key)


def read_shards(
    pattern: str,
    caption_key: str = "txt",
    index_dir: Path | None = None,
    limit: float = left_out.LIMIT,
    listing: Path | None = None,
) -> Pairs:
    """Pairs of all tars that `pattern` names, in the order of the names.

    Args:
        pattern: as `expand_shards`.
        caption_key: suffix of the captions' members; `json:NAME` for the value NAME of KEY.json.
        index_dir: where the contents of remote tars are kept, which are otherwise downloaded once to be listed.
        limit: the largest share of samples, and of tars, that may be left out (left_out.py).
        listing: table of what is left out.

    Raises:
        UsageError: a tar that is missing or compressed, more faults than `limit`, or no pairs in them.
    """
    keys, captions = GrowingTexts(), GrowingTexts()
    places = array("q")  # of each picture its tar, offset and length
    faults: list[left_out.Fault] = []
    shards: list[str] = []
    first_tars = []  # of each source
    for part in pattern.split("::"):
        first_tars.append(len(shards))
        shards += expand_shards(part)
    firsts = []  # first caption of each tar
    last = time.monotonic()
    for number, shard in enumerate(shards):
        if time.monotonic() - last > 30:
            last = time.monotonic()
            print(f"listing tars: {number:,} of {len(shards):,}, {len(captions):,} samples", flush=True)
        firsts.append(len(captions))
        samples, found = _samples_of(shard, caption_key, index_dir)
        faults += [left_out.Fault(cause, f"{shard}: {key}") for cause, key in found]
        for key, offset, length, caption in samples:
            places.extend((number, offset, length))
            captions.append(caption)
            keys.append(key)
    left_out.tell_of_cut_tars(pattern, faults, len(shards), limit, listing)
    if not places:
        what = f" ({faults[0].cause}: {faults[0].where})" if faults else ""
        raise UsageError(f"{pattern}: no picture in it{what}; needed is KEY.jpg beside KEY.{caption_key.split(':')[0]}")
    tar, offset, length = np.array(places).reshape(-1, 3).T
    pictures = Pictures(Texts.of(shards), "", tar.astype(np.int32), offset.copy(), length.copy())
    pairs = Pairs("shards", pictures, captions.packed(), np.arange(len(tar)), keys.packed(), faults)
    pairs.starts = np.array([firsts[tar] for tar in first_tars], dtype=np.int64)
    return drop_bad_captions(pairs, pattern, limit, listing)


def expand_shards(pattern: str) -> list[str]:
    """Files and URLs of tars: `a-{0000..0100}.tar`, `{train,extra}-{0..9}.tar`, for files also shell wildcards.

    Several are joined by `::`; `@FILE` stands for the lines of a text file, each in this notation.
    """
    shards: list[str] = []
    for part in pattern.split("::"):
        if part.startswith("pipe:"):
            raise UsageError(f"{part}: no commands are run; give files or http(s) URLs of tars")
        if part.startswith("@"):
            shards += [shard for line in _lines(part[1:]) for shard in expand_shards(line)]
            continue
        for name in _expand_braces(part):
            if re.search(r"\.(tgz|tar\.\w+)$", name.partition("?")[0]):
                raise UsageError(
                    f"{name}: compressed; pictures are read out of a tar by their offset, so decompress it first "
                    "(JPEGs hardly shrink anyway)"
                )
            if remote.is_remote(name) or os.path.isfile(name):  # a folder may be called "set [1]"
                shards.append(name)
                continue
            found = [file for file in sorted(glob.glob(name)) if os.path.isfile(file)]
            if not found:
                raise UsageError(f"--train_shards/--validation_shards {part}: no such file {name}")
            shards += found
    return shards


def _lines(file: str) -> list[str]:
    """The tars that a list names, those of its own folder by their names alone."""
    try:
        lines = [line.strip() for line in Path(file).read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{file}: not a list of tars: write one a line, in UTF-8 ({error})") from None
    wanted = [line for line in lines if line and not line.startswith("#")]
    if not wanted or any(line.startswith("@") for line in wanted):
        raise UsageError(f"{file}: no tars in it, or a list in a list: write a tar a line")
    return [line if line.startswith("pipe:") else relative_to(os.path.dirname(file), line) for line in wanted]


def _expand_braces(part: str) -> list[str]:
    """`{first..last}` and `{a,b,c}`, as many as there are."""
    match = re.search(r"\{(\d+)\.\.(\d+)\}|\{([^{}]*,[^{}]*)\}", part)
    if match is None:
        return [part]
    first, last, names = match.groups()
    if names is None:
        if int(last) - int(first) > MAX_TARS:
            raise UsageError(f"{part}: more than {MAX_TARS:,} tars: split the pattern")
        choices = [f"{n:0{len(first)}d}" for n in range(int(first), int(last) + 1)]
    else:
        choices = names.split(",")
    return [whole for n in choices for whole in _expand_braces(part[: match.start()] + n + part[match.end() :])]


def _samples_of(shard: str, caption_key: str, index_dir: Path | None) -> Listed:
    if not remote.is_remote(shard):
        with open(shard, "rb") as file:
            return list_tar(file, "r:", caption_key, os.stat(shard).st_size)
    if index_dir is None:
        raise UsageError(f"{shard}: give --cache_dir, where the contents of remote tars are kept")
    samples, faults = _remote_samples(shard, caption_key, index_dir)
    return [tuple(sample) for sample in samples], [tuple(fault) for fault in faults]


def _remote_samples(shard: str, caption_key: str, index_dir: Path) -> Listed:
    version = remote.version(shard)
    digest = hashlib.blake2b(f"2 {shard} {version} {caption_key}".encode(), digest_size=12).hexdigest()
    index = index_dir / f"shard_{digest}.json"
    if listed := kept_json(index):
        return listed
    size = int(version.split()[0]) if version.split()[0].isdecimal() else None
    print(f"listing {shard}", flush=True)
    try:
        listed = remote.read_stream(shard, lambda file: list_tar(file, "r|", caption_key, size))
    except OSError as error:
        raise UsageError(f"{shard}: {error}") from None
    keep_json(index, listed, f"the contents of {shard}")
    return listed


def list_tar(file: BinaryIO, mode: str, caption_key: str, size: int | None) -> Listed:
    """Samples of a tar, and the faults of others. One that is cut short keeps what comes before.

    Args:
        mode: of tarfile: "r:" for a file, "r|" for a stream.
        size: of the tar in bytes, where it is known: what a member lacks of its own shows by it.
    """
    samples: list[Sample] = []
    faults: list[tuple[str, str]] = []
    group = _Group("")
    try:
        with tarfile.open(fileobj=file, mode=mode, tarinfo=Member) as tar:
            for member in tar:
                if not member.isfile() or is_litter(member.name):
                    continue
                if size is not None and member.offset_data + member.size > size:
                    raise tarfile.ReadError(f"ends within {member.name}")
                folder, _, name = member.name.rpartition("/")
                stem, _, suffix = name.partition(".")
                key = f"{folder}/{stem}" if folder else stem
                if key != group.key:
                    group.close(samples, faults)
                    group = _Group(key)
                group.take(tar, member, suffix, caption_key)
    except (tarfile.TarError, EOFError, OSError) as error:
        if isinstance(error, OSError) and mode == "r|":
            raise  # of the network, which is tried again
        faults.append((left_out.CUT_TAR, str(error)))
        if group.caption is None:
            group = _Group("")  # its caption may lie behind the cut
    group.close(samples, faults)
    return samples, faults


@dataclass
class _Group:
    """The members of one key, which lie side by side."""

    key: str
    picture: tuple[int, int] | None = None  # offset and length
    caption: str | None = None
    fault: str | None = None
    other: str = ""  # suffix of a member that is neither

    def take(self, tar: tarfile.TarFile, member: tarfile.TarInfo, suffix: str, caption_key: str) -> None:
        kind, _, name = caption_key.partition(":")
        if suffix.lower() in IMAGE_SUFFIXES:
            self.picture = (member.offset_data, member.size)
        elif suffix == kind and member.size > MAX_CAPTION_BYTES:
            self.fault = left_out.BAD_JSON if name else left_out.NOT_UTF8
        elif suffix == kind:
            try:
                self.caption = tar.extractfile(member).read().decode("utf-8")
                if name:
                    value = json.loads(self.caption)
                    value = value.get(name) if isinstance(value, dict) else None
                    self.caption = value if isinstance(value, str) else ""
            except UnicodeDecodeError:
                self.fault = left_out.NOT_UTF8
            except (ValueError, RecursionError):
                self.fault = left_out.BAD_JSON
        elif suffix.lower() not in ("json", "txt", "cls", "url", "sha256"):
            self.other = suffix

    def close(self, samples: list[Sample], faults: list[tuple[str, str]]) -> None:
        """Adds the sample, or what is wrong with it. A caption that says nothing is looked for later."""
        if not self.key:
            return
        if self.fault is None and self.picture is None:
            self.fault = f"{left_out.UNKNOWN_PICTURE} (.{self.other})" if self.other else left_out.NO_PICTURE
        if self.fault:
            faults.append((self.fault, self.key))
        else:
            samples.append((self.key, *self.picture, self.caption or ""))
