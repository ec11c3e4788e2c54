"""The corpus as batches of masked samples: fairseq's masked_lm task, in one place."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig

from common.device import to_device
from common.errors import UsageError
from data2vec.data.batching import batch_by_size, filter_by_size, ordered_indices
from data2vec.data.dictionary import MASK, Dictionary
from data2vec.data.epochs import BrokenSample, SplitBatches
from data2vec.data.indexed_dataset import IndexedDataset
from data2vec.data.masking import mask_tokens
from data2vec.data.token_blocks import TokenBlockDataset
from data2vec.model.text_model import BatchPlan, plan_batch, target_config

PROBED_SAMPLES = 256  # samples looked at before training for ids that the vocabulary does not have


@dataclass(frozen=True)
class MaskOptions:
    """How samples are masked and laid out."""

    seed: int
    vocab: Dictionary
    teacher_input: str = "masked_only"
    compact: bool = True
    length_multiple: int = 1
    mask: dict[str, Any] = field(default_factory=dict)  # keyword arguments of mask_tokens


@dataclass
class TextBatch:
    """One micro-batch. An empty shard's batch has no rows."""

    id: torch.Tensor  # [B]
    src_tokens: torch.Tensor  # [B, T], masked, right-padded
    target_tokens: torch.Tensor  # [B, T], masked tokens' ids, pad elsewhere
    src_lengths: torch.Tensor  # [B]
    plan: BatchPlan | None

    @property
    def names(self) -> list[str]:
        """Which samples these are, for messages."""
        return [f"{index}" for index in self.id.tolist()]

    @property
    def num_tokens(self) -> int:
        """Real tokens, padding not counted."""
        return int(self.src_lengths.sum())

    def to(self, device: torch.device) -> TextBatch:
        if device.type == "cpu":
            return self
        move = {name: to_device(getattr(self, name), device) for name in ("src_tokens", "target_tokens")}
        plan = self.plan.to(device) if self.plan else None
        return TextBatch(self.id, src_lengths=self.src_lengths, plan=plan, **move)


class MaskedBlocks:
    """A split's samples: token blocks with <s> in front, masked by (seed, epoch, index)."""

    def __init__(self, path: Path, config: DictConfig, options: MaskOptions):
        self.corpus = IndexedDataset(path)
        if len(self.corpus) == 0 or self.corpus.sizes.max() == 0:
            raise ValueError(f"{path}: the corpus is empty")
        task = config.task
        self.blocks = TokenBlockDataset(
            self.corpus, self.corpus.sizes, task.tokens_per_sample - 1, break_mode=task.sample_break_mode
        )
        if len(self.blocks) == 0:
            raise ValueError(f"{path}: no sample is left after cutting into blocks ({task.sample_break_mode})")
        self.options = options
        self.sizes = self.blocks.sizes + 1  # <s>

    def __len__(self) -> int:
        return len(self.sizes)

    def sample(self, index: int) -> np.ndarray:
        """int64 [T] with <s>, unmasked.

        Raises:
            BrokenSample: an id that the vocabulary does not have, or that is <mask>'s.
        """
        tokens = self.blocks.tokens(index)
        limit = self.options.vocab.index(MASK)
        if len(tokens) and (tokens.max() >= limit or tokens.min() < 0):
            worst = int(tokens.max() if tokens.max() >= limit else tokens.min())
            raise BrokenSample(
                f"{self.corpus.path}: holds token id {worst}, but dict.txt has ids 0 to {limit - 1}: "
                "the corpus was binarized with another vocabulary"
            )
        return np.concatenate([[self.options.vocab.bos_index], tokens])

    def check_ids(self) -> None:
        """Looks at samples spread over the corpus, so that a wrong vocabulary is found before training."""
        for index in np.unique(np.linspace(0, len(self) - 1, PROBED_SAMPLES).astype(int)):
            self.sample(int(index))

    def collate(self, indices: np.ndarray, epoch: int) -> TextBatch:
        """Masks the samples and pads them on the right to the longest."""
        options = self.options
        pad, mask_idx = options.vocab.pad_index, options.vocab.index(MASK)
        multiple = options.length_multiple
        width = -(-int(self.sizes[indices].max()) // multiple) * multiple if len(indices) else 0
        source = np.full((len(indices), width), pad)
        target = np.full((len(indices), width), pad)
        for row, index in enumerate(indices):
            masked = mask_tokens(
                self.sample(int(index)), options.seed, epoch, index, options.vocab, pad, mask_idx, **options.mask
            )
            source[row, : len(masked[0])], target[row, : len(masked[1])] = masked
        source, target = torch.from_numpy(source), torch.from_numpy(target)
        plan = None
        if len(indices):
            plan = plan_batch(source, target, mask_idx, pad, options.teacher_input, options.compact, multiple)
        lengths = torch.from_numpy(self.sizes[indices])
        return TextBatch(torch.from_numpy(np.asarray(indices)), source, target, lengths, plan)


class PretrainingData(SplitBatches):
    """Vocabulary, splits and batch plans of a run on text.

    Raises:
        UsageError: missing folder, vocabulary or split; damaged files; ids without a token; nothing to train on.
    """

    def __init__(self, config: DictConfig, rank: int = 0, world_size: int = 1):
        super().__init__(config, rank, world_size)
        self.folder = Path(config.task.data)
        if not self.folder.is_dir():
            raise UsageError(
                f"task.data={config.task.data}: no such folder (one folder with dict.txt and train.bin/.idx)"
            )
        task = config.task
        mask_names = ("mask_prob", "leave_unmasked_prob", "random_token_prob", "freq_weighted_replacement")
        mask_names += ("mask_multiple_length", "mask_stdev")
        if not (self.folder / "dict.txt").is_file():
            raise UsageError(
                f"{self.folder / 'dict.txt'}: no such file; task.data is the --destdir of preprocess.py or "
                "fairseq-preprocess, with dict.txt and train.bin/.idx"
            )
        try:
            self.vocab = Dictionary.load(self.folder / "dict.txt")
        except (OSError, ValueError) as error:
            raise UsageError(f"the vocabulary cannot be read: {error}") from None
        self.vocab.add_symbol(MASK)
        # with these targets padding counts, so it has to be the reference's
        whole_sequence = target_config(config.model).uses_whole_sequence
        self.options = MaskOptions(
            config.common.seed,
            self.vocab,
            config.model.teacher_input,
            not whole_sequence,
            1 if whole_sequence else config.dataset.required_seq_len_multiple,
            {name: task[name] for name in mask_names},
        )

    def open_split(self, name: str, training: bool) -> tuple[MaskedBlocks, list[np.ndarray]]:
        try:
            data = MaskedBlocks(self.folder / name, self.config, self.options)
            data.check_ids()
            return data, self._plan(name, data, training)
        except (OSError, ValueError) as error:
            raise UsageError(f"split '{name}' of task.data: {error}") from None

    def _plan(self, name: str, data: MaskedBlocks, training: bool) -> list[np.ndarray]:
        dataset = self.config.dataset
        limit = self.config.model.max_positions
        order = ordered_indices(data.sizes, self.config.common.seed)
        kept, dropped = filter_by_size(order, data.sizes, limit)
        if len(dropped):
            if not training and not dataset.skip_invalid_size_inputs_valid_test:
                raise ValueError(
                    f"{len(dropped)} samples are longer than {limit} tokens: set "
                    "dataset.skip_invalid_size_inputs_valid_test=true to leave them out"
                )
            self.notes.append(
                f"{name}: {len(dropped)} of {len(order)} samples are longer than {limit} tokens and are left out"
            )
        max_tokens, max_rows = dataset.max_tokens, dataset.batch_size
        if not training:
            max_tokens = dataset.max_tokens_valid or max_tokens
            max_rows = dataset.batch_size_valid or max_rows
        batches = batch_by_size(
            kept,
            num_tokens_vec=data.sizes[kept],
            max_tokens=max_tokens,
            max_sentences=max_rows,
            required_batch_size_multiple=dataset.required_batch_size_multiple,
        )
        if not batches:
            raise ValueError(
                f"no batch is left: {len(kept)} samples fit {limit} tokens, and a last batch that is no multiple of "
                f"{dataset.required_batch_size_multiple} rows (dataset.required_batch_size_multiple) is dropped"
            )
        return batches
