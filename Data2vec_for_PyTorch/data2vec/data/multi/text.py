"""A corpus as batches of whole blocks with several masks each: fairseq's masked_lm task with d2v2_multi."""

from __future__ import annotations

import numpy as np
import torch
from omegaconf import DictConfig

from common.device import mix_seed
from data2vec.data.multi.batch import MultiBatch
from data2vec.data.multi.masks import random_masks
from data2vec.data.pretraining_data import MaskedBlocks, PretrainingData, SampleOptions
from data2vec.model.multi.mask_plan import plan_masks


class VisibleBlocks(MaskedBlocks):
    """A split's samples, of which masks hide tokens; these follow from (seed, epoch, index)."""

    def __init__(self, paths, config: DictConfig, options: SampleOptions):
        super().__init__(paths, config, options)
        self.masks, self.mask_prob = config.model.clone_batch, config.model.modalities.text.mask_prob

    def check(self) -> None:
        """Looks at samples spread over the corpus, so that a wrong vocabulary is found before training. ValueError."""
        for index in self._probed():
            self.sample(index)

    def hidden(self, index: int, epoch: int) -> np.ndarray:
        """bool [M, T], True at hidden tokens."""
        rng = np.random.default_rng(mix_seed(self.options.seed, epoch, index))
        return random_masks(int(self.sizes[index]), self.masks, self.mask_prob, rng)

    def collate(self, indices: np.ndarray, epoch: int) -> MultiBatch:
        """Pads the samples on the right to the longest."""
        width, count = self.padded_width(indices), len(indices)
        source = np.full((count, width), self.options.vocab.pad_index)
        hidden = np.zeros((count, self.masks, width), dtype=bool)
        for row, index in enumerate(indices.tolist()):
            tokens = self.sample(index)
            source[row, : len(tokens)] = tokens
            hidden[row, :, : len(tokens)] = self.hidden(index, epoch)
        real = torch.arange(width) < torch.from_numpy(self.sizes[indices])[:, None]
        total = int(self.sizes[indices].sum())
        has_padding = total < source.size
        return MultiBatch(
            torch.from_numpy(np.asarray(indices)),
            torch.from_numpy(source),
            plan_masks(torch.from_numpy(hidden), real if has_padding else None) if count else None,
            [str(index) for index in indices.tolist()],
            total,
            has_padding,
        )


class MultiTextData(PretrainingData):
    """`PretrainingData` of data2vec 2.0."""

    samples = VisibleBlocks

    @property
    def longest(self) -> int:
        return self.config.model.modalities.text.max_source_positions

    def sample_options(self, config: DictConfig) -> SampleOptions:
        return SampleOptions(config.common.seed, self.vocab, length_multiple=config.dataset.required_seq_len_multiple)
