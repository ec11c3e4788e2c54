"""The corpus as batches of masked samples: fairseq's masked_lm task, in one place."""

from __future__ import annotations

import hashlib
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
from data2vec.data.indexed_dataset import JoinedCorpus, parts_of
from data2vec.data.masking import mask_tokens
from data2vec.data.token_blocks import TokenBlockDataset
from data2vec.model.text_model import BatchPlan, plan_batch, target_config

PROBED_SAMPLES = 256  # samples looked at before training for ids that the vocabulary does not have


@dataclass(frozen=True)
class SampleOptions:
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

    def __init__(self, paths: list[Path], config: DictConfig, options: SampleOptions):
        self.corpus, path = JoinedCorpus(paths), paths[0]
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

    def identity(self) -> dict[str, Any]:
        """Sentences, tokens, and digests of all sizes, of the samples looked at before training, and of the words."""
        content = hashlib.sha256(np.ascontiguousarray(self.corpus.sizes).tobytes())
        for index in self._probed():
            content.update(self.blocks.tokens(index).tobytes())
        tokens = int(self.corpus.sizes.sum(dtype=np.int64))
        found = {"sentences": len(self.corpus), "tokens": tokens, "digest": content.hexdigest()[:16]}
        return found | {"vocabulary": self.options.vocab.digest()}

    def _probed(self) -> list[int]:
        return np.unique(np.linspace(0, len(self) - 1, PROBED_SAMPLES).astype(int)).tolist()

    def sample(self, index: int) -> np.ndarray:
        """int64 [T] with <s>, unmasked.

        Raises:
            BrokenSample: an id that the vocabulary does not have, or that is <mask>'s.
        """
        tokens, vocab = self.blocks.tokens(index), self.options.vocab
        bad = tokens[(tokens < 0) | (tokens >= len(vocab)) | (tokens == vocab.index(MASK))]
        if len(bad):
            raise BrokenSample(
                f"{self.corpus.path}: holds token id {bad[0]}, but dict.txt has ids 0 to {len(vocab) - 1}, of which "
                f"{vocab.index(MASK)} is {MASK}: the corpus was binarized with another vocabulary"
            )
        return np.concatenate([[self.options.vocab.bos_index], tokens])

    def padded_width(self, indices: np.ndarray) -> int:
        """Of a batch: its longest sample's length, or the multiple above it; 0 of no samples."""
        multiple = self.options.length_multiple
        return -(-int(self.sizes[indices].max()) // multiple) * multiple if len(indices) else 0

    def masked(self, index: int, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """(source, target) of `mask_tokens`."""
        options = self.options
        vocab = options.vocab
        return mask_tokens(
            self.sample(index), options.seed, epoch, index, vocab, vocab.pad_index, vocab.index(MASK), **options.mask
        )

    def check(self) -> None:
        """Looks at samples spread over the corpus, so that a wrong vocabulary is found before training, and masks that
        hide nothing. ValueError."""
        probed = self._probed()
        mask_idx = self.options.vocab.index(MASK)
        if not sum(int((self.masked(index, epoch=1)[0] == mask_idx).sum()) for index in probed):
            raise ValueError(
                f"no token is masked in the {len(probed)} samples looked at: raise task.mask_prob, or lower "
                "task.mask_multiple_length or leave_unmasked_prob + random_token_prob"
            )

    def collate(self, indices: np.ndarray, epoch: int) -> TextBatch:
        """Masks the samples and pads them on the right to the longest."""
        options = self.options
        pad, mask_idx = options.vocab.pad_index, options.vocab.index(MASK)
        multiple, width = options.length_multiple, self.padded_width(indices)
        source = np.full((len(indices), width), pad)
        target = np.full((len(indices), width), pad)
        for row, index in enumerate(indices):
            masked = self.masked(int(index), epoch)
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

    samples: type[MaskedBlocks] = MaskedBlocks  # of a split

    def __init__(self, config: DictConfig, rank: int = 0, world_size: int = 1):
        self.folders = _folders(config.task.data)
        super().__init__(config, rank, world_size, places=len(self.folders))
        self.vocab = _vocabulary(self.folders[0])
        self.options = self.sample_options(config)

    @property
    def longest(self) -> int:
        """Samples of more tokens are left out."""
        return self.config.model.max_positions

    def sample_options(self, config: DictConfig) -> SampleOptions:
        task = config.task
        mask_names = ("mask_prob", "leave_unmasked_prob", "random_token_prob", "freq_weighted_replacement")
        mask_names += ("mask_multiple_length", "mask_stdev")
        # with these targets padding counts, so it has to be the reference's
        whole_sequence = target_config(config.model).uses_whole_sequence
        return SampleOptions(
            config.common.seed,
            self.vocab,
            config.model.teacher_input,
            not whole_sequence,
            1 if whole_sequence else config.dataset.required_seq_len_multiple,
            {name: task[name] for name in mask_names},
        )

    def open_split(self, name: str, training: bool, place: int) -> tuple[MaskedBlocks, list[np.ndarray]]:
        prefix = self.folders[place] / name
        parts = parts_of(prefix) if training else [prefix]
        if len(parts) > 1:
            self.notes.append(f"{name}: read together with {', '.join(part.name for part in parts[1:])}")
        try:
            data = self.samples(parts, self.config, self.options)
            data.check()
            return data, self._plan(name, data, training)
        except (OSError, ValueError) as error:
            raise UsageError(f"split '{name}' of task.data: {error}") from None

    def _plan(self, name: str, data: MaskedBlocks, training: bool) -> list[np.ndarray]:
        dataset = self.config.dataset
        limit = self.longest
        order = ordered_indices(data.sizes, self.config.common.seed)
        kept, dropped = filter_by_size(order, data.sizes, limit)
        if len(dropped):
            if not training and not dataset.skip_invalid_size_inputs_valid_test:
                raise ValueError(
                    f"{len(dropped)} samples are longer than {limit} tokens: set "
                    "dataset.skip_invalid_size_inputs_valid_test=true to leave them out"
                )
            share = 100 * data.sizes[dropped].sum() / data.sizes.sum()
            self.notes.append(
                f"{name}: {len(dropped)} of {len(order)} samples are longer than {limit} tokens and are left out, with "
                f"{share:.1f} % of the tokens"
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


def _folders(data: str) -> list[Path]:
    """The folders of `task.data`: one, or several with colons between them, of which each epoch takes the next."""
    folders = [Path(data)] if Path(data).is_dir() else [Path(part) for part in data.split(":") if part]
    for folder in folders:
        if not folder.is_dir():
            raise UsageError(f"task.data={data}: {folder}: no such folder (one with dict.txt and train.bin/.idx)")
    if not folders:
        raise UsageError("task.data is empty: give a folder with dict.txt and train.bin/.idx")
    return folders


def _vocabulary(folder: Path) -> Dictionary:
    """dict.txt, with <mask> last where it is not listed."""
    if not (folder / "dict.txt").is_file():
        raise UsageError(
            f"{folder / 'dict.txt'}: no such file; task.data is the --destdir of preprocess.py or fairseq-preprocess, "
            "with dict.txt and train.bin/.idx"
        )
    try:
        vocab = Dictionary.load(folder / "dict.txt")
    except (OSError, ValueError) as error:
        raise UsageError(f"the vocabulary cannot be read: {error}") from None
    vocab.add_symbol(MASK)
    return vocab
