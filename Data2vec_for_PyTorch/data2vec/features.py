"""Representations of texts or pictures by a pretrained encoder: a mean for each, or the states of all tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from omegaconf import DictConfig

from common import device as devices
from common import distributed
from common.data import pictures
from common.distributed import World
from common.errors import UsageError
from common.run.progress import bar
from data2vec.data.bpe import TextEncoding
from data2vec.data.sentence_data import Sentences
from data2vec.data.tables import SUFFIXES, Row, read_table
from data2vec.model.encoder import SentenceEncoder


@dataclass(frozen=True)
class Options:
    """pool: "mean" or "tokens"."""

    pool: str
    precision: str
    batch_size: int


def text_rows(path: Path, column: str) -> list[Row]:
    """A table's column, or the lines of any other file. UsageError naming file and line."""
    if not path.is_file():
        raise UsageError(f"{path}: no such file")
    if path.suffix in SUFFIXES:
        return read_table(path, [column], None)
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: not UTF-8 ({error.reason} at byte {error.start})") from None
    lines = lines[:-1] if lines[-1] == "" else lines
    if empty := [number for number, line in enumerate(lines, 1) if not line.strip()]:
        raise UsageError(f"{path}, line {empty[0]}: is empty, and has no representation: remove it")
    if not lines:
        raise UsageError(f"{path}: no lines")
    return [Row(number, (line.strip(),), None) for number, line in enumerate(lines, 1)]


@torch.no_grad()
def text_features(
    encoder: SentenceEncoder, path: Path, rows: list[Row], encoding: TextEncoding, world: World, how: Options
) -> tuple[dict[str, np.ndarray], int]:
    """(arrays, number of texts that were cut at the model's length).

    Of `mean`: features fp32 [N, C], over a text's tokens without <s> and </s>. Of `tokens`: states fp32 [T, C] and ids
    int64 [T] of all texts one after the other, with <s> and </s>; text i has rows offsets[i] to offsets[i + 1].
    """
    data = Sentences(path, rows, encoding, encoder.config.max_source_positions, classes=None)
    order = np.argsort(data.sizes, kind="stable")  # little padding
    found: dict[int, np.ndarray] = {}
    for indices in bar(_own_batches(order, how.batch_size, world), "features"):
        made = data.collate(indices, epoch=1).to(world.device)
        with devices.autocast(world.device, how.precision):
            states = encoder(made.tokens, made.has_padding).float().cpu().numpy()  # [B, T, C]
        for index, state in zip(indices.tolist(), states, strict=True):
            state = state[: data.sizes[index]]
            found[index] = state[1:-1].mean(axis=0) if how.pool == "mean" else state
    found = _of_all_ranks(found)
    names = np.array([f"{path.name}:{row.line}" for row in rows])
    if how.pool == "mean":
        return {"features": np.stack(found), "names": names}, data.cut
    offsets = np.concatenate([[0], np.cumsum(data.sizes)])
    ids = np.concatenate(data.tokens)
    return {"states": np.concatenate(found), "ids": ids, "offsets": offsets, "names": names}, data.cut


@torch.no_grad()
def picture_features(
    model: torch.nn.Module, folder: Path, config: DictConfig, world: World, how: Options
) -> dict[str, np.ndarray]:
    """Of `mean`: features fp32 [N, C], over patches. Of `tokens`: states fp32 [N, P, C] of the patches.

    Pictures are centre-cropped, and nothing is masked. UsageError for one that cannot be read.
    """
    from data2vec.data.image_data import Normalize
    from data2vec.image_probe import read_cropped

    files = sorted(pictures.find(folder))
    if not files:
        raise UsageError(f"{folder}: no pictures ({', '.join(pictures.SUFFIXES)})")
    pictures.check(files)
    normalize, found = Normalize(config, world.device), {}
    for indices in bar(_own_batches(np.arange(len(files)), how.batch_size, world), "features"):
        images = read_cropped([files[i] for i in indices], config.task.input_size).to(world.device)
        with devices.autocast(world.device, how.precision):
            states = model.patch_states(normalize(images)).float().cpu().numpy()  # [B, P, C]
        for index, state in zip(indices.tolist(), states, strict=True):
            found[index] = state.mean(axis=0) if how.pool == "mean" else state
    names = np.array([Path(file).relative_to(folder).as_posix() for file in files])
    return {"features" if how.pool == "mean" else "states": np.stack(_of_all_ranks(found)), "names": names}


def _own_batches(order: np.ndarray, batch: int, world: World) -> Sequence[np.ndarray]:
    return [order[i : i + batch] for i in range(0, len(order), batch)][world.rank :: world.size]


def _of_all_ranks(found: dict[int, np.ndarray]) -> list[np.ndarray]:
    """By index, on all ranks."""
    together = {index: value for part in distributed.gather_objects(found) for index, value in part.items()}
    return [together[index] for index in range(len(together))]
