"""Pairs from where users keep them: tables (CSV, TSV, JSON lines) and WebDataset tars; what to do about bad rows."""

from __future__ import annotations

import csv
import glob
import hashlib
import json
import os
import re
import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from clip_pretraining.pairs import ImageRef, Pairs, relative_to, unreadable_images
from common import distributed
from common.device import UsageError

MAX_BAD_SHARE = 0.01  # of pictures or captions; above it the data set is wrong, not merely imperfect
IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp", "bmp")


def read_table(path: str | Path, image_column: str, caption_column: str, image_root: str | Path | None = None) -> Pairs:
    """Pairs of a .csv, .tsv, .json or .jsonl file.

    Captions are text, always: the words "None", "NA" and "null" stay words. Pictures are looked up in `image_root`,
    default the table's folder.

    Raises:
        UsageError: no such file or column, or a row that is cut short; the message names file and line.
    """
    path = Path(path)
    folder = Path(image_root) if image_root else path.parent
    rows = list(_rows(path, image_column, caption_column))
    if not rows:
        raise UsageError(f"{path}: no rows")
    names: dict[str, int] = {}
    owner = [names.setdefault(image, len(names)) for image, _ in rows]
    refs = [ImageRef(relative_to(folder, name)) for name in names]
    return _drop_empty_captions(Pairs(path.stem, refs, [caption for _, caption in rows], owner, list(names)), str(path))


def _rows(path: Path, image_column: str, caption_column: str) -> Iterator[tuple[str, str]]:
    suffix = path.suffix.lower()
    if suffix not in (".csv", ".tsv", ".json", ".jsonl"):
        raise UsageError(f"{path}: give a .csv, .tsv, .json or .jsonl file")
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            if suffix in (".csv", ".tsv"):
                records = _table_records(file, "\t" if suffix == ".tsv" else ",")
            else:
                records = _json_records(file, path)
            for line, record in records:
                for column in (image_column, caption_column):
                    if column not in record:
                        columns = ", ".join(str(c) for c in record)
                        raise UsageError(f"{path}:{line}: no column {column!r} (there are: {columns})")
                image, caption = record[image_column], record[caption_column]
                if not isinstance(image, str) or not image:
                    raise UsageError(f"{path}:{line}: column {image_column!r} holds no file name but {image!r}")
                if caption is not None and not isinstance(caption, str):
                    raise UsageError(f"{path}:{line}: the caption is not text but {caption!r}")
                yield image, caption or ""
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise UsageError(f"{path}: not readable as UTF-8 text in {suffix} form ({error})") from None


def _table_records(file: Iterable[str], delimiter: str) -> Iterator[tuple[int, dict]]:
    reader = csv.DictReader(file, delimiter=delimiter)
    for record in reader:
        yield reader.line_num, record


def _json_records(file, path: Path) -> Iterator[tuple[int, dict]]:
    try:
        if path.suffix.lower() == ".json":
            content = json.load(file)
            records = content.get("data", []) if isinstance(content, dict) else content
            yield from enumerate(records, 1)
            return
        for number, line in enumerate(file, 1):
            if line.strip():
                yield number, json.loads(line)
    except json.JSONDecodeError as error:
        raise UsageError(f"{path}: not valid JSON: {error}") from None


def expand_shards(pattern: str) -> list[str]:
    """WebDataset's shard notation: `a-{0000..0100}.tar`, several joined by `::`, and shell wildcards."""
    shards: list[str] = []
    for part in pattern.split("::"):
        for name in _expand_range(part):
            found = sorted(glob.glob(name)) if glob.has_magic(name) else [name]
            if not found or not all(os.path.isfile(f) for f in found):
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


def read_shards(pattern: str, caption_key: str = "txt") -> Pairs:
    """Pairs of WebDataset tars on any number of disks: KEY.jpg beside KEY.txt.

    Only headers and captions are read here; a picture is later read straight out of its tar by offset. That keeps
    random order, exact resume and equal batches on all ranks, which a stream of shards has none of. The tars must be
    plain (not gzipped) files.
    """
    refs: list[ImageRef] = []
    captions: list[str] = []
    keys: list[str] = []
    for shard in expand_shards(pattern):
        for key, ref, caption in _shard_samples(shard, caption_key):
            refs.append(ref)
            captions.append(caption)
            keys.append(key)
    if not refs:
        raise UsageError(f"{pattern}: no sample with a picture and a .{caption_key} member")
    return _drop_empty_captions(Pairs("shards", refs, captions, np.arange(len(refs)), keys), pattern)


def _shard_samples(shard: str, caption_key: str) -> Iterator[tuple[str, ImageRef, str]]:
    try:
        with tarfile.open(shard, "r:") as tar:
            current, found = None, {}
            for member in tar:
                if not member.isfile():
                    continue
                key, _, suffix = member.name.partition(".") if "/" not in member.name else _split_key(member.name)
                if key != current:
                    current, found = key, {}
                if suffix.lower() in IMAGE_SUFFIXES:
                    found["image"] = ImageRef(shard, member.offset_data, member.size)
                elif suffix == caption_key:
                    found["caption"] = tar.extractfile(member).read().decode("utf-8")
                else:
                    continue
                if len(found) == 2:
                    yield key, found["image"], found["caption"]
    except (tarfile.TarError, EOFError, OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{shard}: not a readable, uncompressed tar of UTF-8 captions ({error})") from None


def _split_key(name: str) -> tuple[str, str, str]:
    folder, _, file = name.rpartition("/")
    stem, dot, suffix = file.partition(".")
    return f"{folder}/{stem}", dot, suffix


def _drop_empty_captions(pairs: Pairs, source: str) -> Pairs:
    empty = [i for i, caption in enumerate(pairs.captions) if not caption.strip()]
    if not empty:
        return pairs
    first = pairs.image_keys[pairs.image_of_caption[empty[0]]]
    _tolerate(len(empty), len(pairs), f"{source}: {len(empty)} captions of {len(pairs)} are empty (first: {first})")
    return pairs.take(np.setdiff1d(np.arange(len(pairs)), empty))


def check_images(pairs: Pairs, workers: int, cache_dir: Path) -> dict[int, str]:
    """{position: reason} of the pictures that cannot be read. Each is decoded once, however many captions it has.

    The verdict is kept in `cache_dir` for as long as no file changes.
    """
    digest = hashlib.blake2b(digest_size=12)
    for ref in pairs.images:
        digest.update(f"{ref.name} {file_stamp(ref.path)}\n".encode())
    verdict = cache_dir / f"unreadable_{pairs.name}_{digest.hexdigest()}.json"
    if verdict.is_file():
        return {int(position): reason for position, reason in json.loads(verdict.read_text()).items()}
    bad = unreadable_images(pairs.images, workers)
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        partial = verdict.with_suffix(f".{os.getpid()}")
        partial.write_text(json.dumps(bad))
        os.replace(partial, verdict)
    except OSError as error:
        print(f"note: the check of the pictures cannot be kept in {cache_dir} ({error.strerror})", flush=True)
    return bad


def drop_unreadable(pairs: Pairs, bad: dict[int, str]) -> Pairs:
    """Without the pictures `check_images` named, and without their captions.

    Raises:
        UsageError: more than 1 % of the pictures are bad.
    """
    if bad:
        listed = "; ".join(list(bad.values())[:3])
        message = f"{pairs.name}: {len(bad)} pictures of {len(pairs.images)} cannot be read ({listed})"
        _tolerate(len(bad), len(pairs.images), message)
    return pairs.without_images(sorted(bad))


def file_stamp(path: str) -> str:
    """Size and modification time: changes when the file does."""
    try:
        info = os.stat(path)
    except OSError:
        return "absent"
    return f"{info.st_size} {info.st_mtime_ns}"


def _tolerate(bad: int, total: int, message: str) -> None:
    """Reports and goes on below the limit, stops above it."""
    if bad > MAX_BAD_SHARE * total:
        raise UsageError(f"{message}: above {MAX_BAD_SHARE:.0%}, so the data set itself is wrong")
    if distributed.rank() == 0:
        print(f"warning: {message}: skipped", flush=True)
