"""From options to a split that is ready to train on: found, read and tokenised once, checked, shared by a host."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from clip_pretraining.data import coco, left_out
from clip_pretraining.data.pairs import Pairs
from clip_pretraining.data.picture_check import check_images, file_stamp, keep_json, kept_json, tell_unreadable
from clip_pretraining.data.shards import expand_shards, read_shards
from clip_pretraining.data.stored import Columns, key_of, stored
from clip_pretraining.data.tables import read_table
from clip_pretraining.data.texts import Texts
from clip_pretraining.data.tokenization import PackedCaptions, clean_caption
from clip_pretraining.options.arguments import DataArguments
from common import distributed
from common.distributed import World
from common.errors import UsageError


@dataclass
class Source:
    """Where a split's pairs come from."""

    name: str
    described: str  # in messages
    cache: Path  # for what is worked out once
    facts: dict[str, Any]  # what its pairs follow from; "sources" maps files to their stamps
    read: Callable[..., Pairs]  # given `limit` and `listing` of left_out.py

    @property
    def listing(self) -> Path:
        return self.cache / f"left_out_{self.name}.tsv"


@dataclass
class Split:
    """Pairs and tokens, in arrays that all processes of a host share."""

    pairs: Pairs
    tokens: PackedCaptions
    identity_file: Path  # keeps what the pairs are by content

    def identity(self) -> dict[str, int | str]:
        """As `Pairs.identity`, on all ranks; worked out by one of them and kept."""
        found = None
        if distributed.rank() == 0:
            found = kept_json(self.identity_file)
            if not found:
                found = self.pairs.identity()
                keep_json(self.identity_file, found, "what the pairs are by content")
        return distributed.broadcast_object(found)


def find(split: str, data: DataArguments, cache_dir: str | None) -> Source:
    """The source of "train" or "val" that the options name.

    Raises:
        UsageError: it is not there; remote tars without a place for their contents.
    """
    long_name = {"train": "train", "val": "validation"}[split]
    table, shards = getattr(data, f"{long_name}_file"), getattr(data, f"{long_name}_shards")
    if split == "val" and data.validation_share:
        table, shards = data.train_file, data.train_shards
    if table:
        source = _table("::".join(map(os.path.abspath, table.split("::"))), data, cache_dir)
    elif shards:
        source = _tars(shards, data, cache_dir)
    else:
        source = _coco(split, data, cache_dir)
    source.facts["head"] = data.max_train_samples if split == "train" else data.max_eval_samples
    if data.validation_share:
        source.facts["part"] = (split, data.validation_share)
        source.name += "" if split == "train" else "_held_out"
    return source


def _table(table: str, data: DataArguments, cache_dir: str | None) -> Source:
    columns = (data.image_column, data.caption_column, data.data_dir and os.path.abspath(data.data_dir), data.delimiter)
    files = table.split("::")
    facts = {"sources": {file: file_stamp(file) for file in files}, "tables": files, "columns": columns}
    cache = Path(cache_dir or Path(files[0]).parent / ".clip_cache")
    return Source(Path(files[0]).stem, table, cache, facts, partial(read_table, table, *columns))


def _tars(pattern: str, data: DataArguments, cache_dir: str | None) -> Source:
    tars = expand_shards(pattern)
    cache = Path(cache_dir or Path(tars[0]).parent / ".clip_cache")
    facts = {"sources": {tar: file_stamp(tar) for tar in tars}, "tars": tars, "key": data.caption_key}
    read = partial(read_shards, pattern, data.caption_key, cache if cache_dir else None)
    return Source("shards", pattern, cache, facts, read)


def _coco(split: str, data: DataArguments, cache_dir: str | None) -> Source:
    captions, pictures = coco.find_split(os.path.abspath(data.data_dir), split, cache_dir)
    facts = {"sources": {str(captions): file_stamp(str(captions))}, "pictures": str(pictures)}
    read = partial(coco.read_captions, captions, pictures, split)
    return Source(split, str(captions), Path(cache_dir or Path(data.data_dir) / ".clip_cache"), facts, read)


def prepare(
    source: Source, data: DataArguments, tokenizer: PreTrainedTokenizerBase, longest: int, workers: int, world: World
) -> Split:
    """The split without what cannot be read, in shared arrays; what was worked out by an earlier start is taken.

    Args:
        longest: tokens of a caption.
        workers: processes that decode pictures for their check.

    Raises:
        UsageError: on all ranks: something wrong with the source, or more of it than --max_bad_share.
    """
    limit, name = data.max_bad_share, source.name
    facts = distributed.broadcast_object(source.facts)
    key = key_of(facts)

    def read() -> Columns:
        pairs = source.read(limit=limit, listing=source.listing)
        if "part" in facts:
            split, share = facts["part"]
            pairs = pairs.held_out(share, keep=split == "val")
            if not len(pairs):
                raise UsageError(
                    f"{source.described}: --validation_share {share} leaves no pairs to {split}: give another"
                )
        return pairs.head(facts["head"]).columns()

    columns, is_new = stored(source.cache, f"pairs_{name}", facts, read, world)
    pairs = Pairs.of_columns(name, columns)
    if not is_new:
        left_out.judge(pairs, source.described, limit, source.listing)
    bad, state = check_images(pairs, workers, source.cache, data.check_images)
    tell_unreadable(pairs, bad, limit, source.listing)

    def tokenise() -> Columns:
        kept = pairs.without_images(sorted(bad))
        captions = Texts.of(map(clean_caption, kept.captions)) if data.clean_captions else kept.captions
        tokens = PackedCaptions.tokenise(captions, tokenizer, longest)
        return {**(kept.columns() if bad else {}), "ids": tokens.ids, "offsets": tokens.offsets}

    facts = {"sources": facts["sources"], "pairs": key, "without": sorted(bad), "longest": longest}
    facts |= {"tokenizer": described(tokenizer), "clean_captions": data.clean_captions}
    ready, _ = stored(source.cache, f"tokens_{name}", facts, tokenise, world)
    pairs = Pairs.of_columns(name, {**columns, **ready}) if bad else pairs
    identity_file = source.cache / f"identity_{name}_{key_of(facts)}_{state}.json"
    return Split(pairs, PackedCaptions(ready["ids"], ready["offsets"]), identity_file)


def described(tokenizer: PreTrainedTokenizerBase) -> str:
    """A digest of all that decides which ids a caption gets."""
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()  # as the last call has left it; the next one sets it anew
    backend.no_padding()
    options = {name: getattr(tokenizer, name) for name in ("split_special_tokens", "truncation_side")}
    return key_of({"rules": backend.to_str(), **options})
