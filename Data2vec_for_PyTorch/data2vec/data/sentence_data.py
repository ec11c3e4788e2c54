"""Tables as batches of token ids: fairseq's sentence_prediction task (<s> a </s>, or <s> a </s> </s> b </s>)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig

from common.device import to_device
from common.errors import UsageError
from common.run.run_folder import listing_identity
from data2vec.data.batching import batch_by_size
from data2vec.data.bpe import TextEncoding
from data2vec.data.epochs import SplitBatches
from data2vec.data.tables import Row, find_table, read_table
from data2vec.model.encoder import Rows


@dataclass
class SentenceBatch:
    """One micro-batch. An empty shard's batch has no rows."""

    id: torch.Tensor  # [B], on the CPU
    tokens: torch.Tensor  # int64 [B, T], right-padded
    first: Rows  # places of the first tokens
    target: torch.Tensor  # [B], class numbers int64 or numbers fp32; zeros where the table has no labels
    has_padding: bool
    num_tokens: int  # real ones
    names: list[str]

    def to(self, device: torch.device) -> SentenceBatch:
        if device.type == "cpu":
            return self
        tokens, target, flat, slot = (
            to_device(t, device) for t in (self.tokens, self.target, self.first.flat, self.first.slot)
        )
        return SentenceBatch(
            self.id, tokens, Rows(flat, slot, self.first.width), target, self.has_padding, self.num_tokens, self.names
        )


class Sentences:
    """A table's rows as ids.

    Args:
        classes: names of the labels in their order; None: the labels are numbers, or there are none.

    Attributes:
        cut: rows that were longer than `longest`.
    """

    def __init__(self, path: Path, rows: list[Row], encoding: TextEncoding, longest: int, classes: list[str] | None):
        self.path, self.rows, self.vocab = path, rows, encoding.vocab
        self.length_multiple = 1
        parts = [encoding.encode([row.texts[i] for row in rows]) for i in range(len(rows[0].texts))]
        self.tokens, self.cut = [], 0
        for texts in zip(*parts, strict=True):
            ids, was_cut = _joined(list(texts), longest, self.vocab.bos_index, self.vocab.eos_index)
            self.tokens.append(ids)
            self.cut += was_cut
        self.sizes = np.array([len(ids) for ids in self.tokens])
        self.classes = classes
        self.targets = np.array([self._target(row) for row in rows], dtype=np.float32 if classes is None else np.int64)

    def __len__(self) -> int:
        return len(self.tokens)

    def _target(self, row: Row) -> float:
        if row.label is None:
            return 0
        if self.classes is not None:
            if row.label not in self.classes:
                raise UsageError(
                    f"{self.path}, line {row.line}: label {row.label!r} must be one of the training table's "
                    f"({', '.join(map(repr, self.classes[:10]))})"
                )
            return self.classes.index(row.label)
        try:
            value = float(row.label)
        except ValueError:
            value = math.nan
        if not math.isfinite(value):
            raise UsageError(
                f"{self.path}, line {row.line}: label {row.label!r} is no number, as task.regression_target=true needs"
            )
        return value

    def identity(self) -> dict[str, Any]:
        """Count, classes, a digest of ids and labels, and one of the words."""
        names = [" ".join(map(str, ids)) for ids in self.tokens]
        return listing_identity(names, self.targets.tolist(), self.classes or ()) | {"vocabulary": self.vocab.digest()}

    def collate(self, indices: np.ndarray, epoch: int) -> SentenceBatch:
        """Pads on the right to the longest."""
        pad, count = self.vocab.pad_index, len(indices)
        longest = int(self.sizes[indices].max()) if count else 0
        width = -(-longest // self.length_multiple) * self.length_multiple
        tokens = np.full((count, width), pad)
        for row, index in enumerate(indices.tolist()):
            tokens[row, : self.sizes[index]] = self.tokens[index]
        places = torch.arange(count)
        total = int(self.sizes[indices].sum())
        names = [f"{self.path.name}:{self.rows[index].line}" for index in indices.tolist()]
        return SentenceBatch(
            torch.from_numpy(np.asarray(indices)),
            torch.from_numpy(tokens),
            Rows(places * width, places, 1),
            torch.from_numpy(self.targets[indices]),
            total < tokens.size,
            total,
            names,
        )


def _joined(parts: list[list[int]], longest: int, bos: int, eos: int) -> tuple[list[int], bool]:
    """(ids with <s> and </s>, whether they were cut): the longer text loses its end."""
    room, cut = longest - 2 * len(parts), False
    while (over := sum(map(len, parts)) - room) > 0:
        cut = True
        long = max(parts, key=len)
        others = max((len(part) for part in parts if part is not long), default=0)
        del long[len(long) - max(1, min(over, len(long) - others)) :]
    ids = [bos, *parts[0], eos]
    for part in parts[1:]:
        ids += [eos, *part, eos]
    return ids, cut


class SentenceData(SplitBatches):
    """The tables of `task.data`, a folder; or of one table, whatever it is asked for.

    Args:
        classes: of a fine-tuned model; by default the training table's labels, sorted.
        labels: False: tables need no label column.

    Raises:
        UsageError: one sentence with file and line.
    """

    def __init__(
        self,
        config: DictConfig,
        rank: int = 0,
        world_size: int = 1,
        classes: list[str] | None = None,
        labels: bool = True,
    ):
        super().__init__(config, rank, world_size)
        task, self.place = config.task, Path(config.task.data)
        if not self.place.exists():
            raise UsageError(f"task.data={task.data}: no such folder (one with train.csv, .tsv or .jsonl)")
        self.encoding = TextEncoding(task.encoder_json, task.vocab_bpe, task.dict)
        self.vocab, self.labels = self.encoding.vocab, labels
        self.classes = None if task.regression_target else classes or self._classes_of_training()

    @property
    def outputs(self) -> int:
        """Of the model: classes, or 1 of a regression."""
        return 1 if self.classes is None else len(self.classes)

    def open_split(self, name: str, training: bool, place: int) -> tuple[Sentences, list[np.ndarray]]:
        path, rows = self._rows(name)
        data = Sentences(path, rows, self.encoding, self.config.task.max_positions, self.classes)
        dataset = self.config.dataset
        data.length_multiple = dataset.required_seq_len_multiple
        if data.cut:
            longest = self.config.task.max_positions
            self.notes.append(f"{path.name}: {data.cut} of {len(data)} rows are cut at {longest} tokens")
        max_tokens, max_rows = dataset.max_tokens, dataset.batch_size
        order = np.random.RandomState(self.config.common.seed).permutation(len(data))
        if not training:
            order = np.argsort(data.sizes, kind="stable")
            max_tokens, max_rows = dataset.max_tokens_valid or max_tokens, dataset.batch_size_valid or max_rows
        try:
            batches = batch_by_size(
                order, num_tokens_vec=data.sizes[order], max_tokens=max_tokens, max_sentences=max_rows
            )
        except ValueError as error:
            raise UsageError(f"{path}: {error}") from None
        return data, batches

    def _rows(self, name: str) -> tuple[Path, list[Row]]:
        task = self.config.task
        path = find_table(self.place, name) if self.place.is_dir() else self.place
        return path, read_table(path, list(task.columns), task.label_column if self.labels else None)

    def _classes_of_training(self) -> list[str]:
        path, rows = self._rows(self.config.dataset.train_subset)
        classes, wanted = sorted({row.label for row in rows}), self.config.task.num_classes
        if wanted is not None and len(classes) != wanted:
            raise UsageError(
                f"{path}: {len(classes)} different labels, but task.num_classes={wanted}: "
                "give their number, or leave it out"
            )
        if len(classes) < 2:
            raise UsageError(f"{path}: all labels are {classes[0]!r}: there is nothing to learn")
        if 2 * len(classes) > len(rows):
            raise UsageError(
                f"{path}: {len(classes)} different labels in {len(rows)} rows: are they numbers to be predicted "
                "(task.regression_target=true), or is task.label_column another?"
            )
        return classes
