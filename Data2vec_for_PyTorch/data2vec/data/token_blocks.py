"""A corpus of sentences cut into training samples of at most N tokens (fairseq TokenBlockDataset)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

BREAK_MODES = ("none", "complete", "complete_doc", "eos")


class TokenBlockDataset(torch.utils.data.Dataset):
    """Blocks of a corpus. Item i is an int64 tensor.

    Break modes: `none` cuts every `block_size` tokens; `complete` fills a block with whole sentences; `complete_doc`
    also ends it at a document's end, a sentence of `document_sep_len` tokens (the empty line), which is dropped;
    `eos` makes one block of each sentence. A sentence longer than a block becomes a block of its own, longer than
    `block_size`; blocks of one token are dropped by `complete_doc`.

    Args:
        dataset: the sentences: an `IndexedDataset`, or any sequence of 1-D integer tensors.
        sizes: tokens of each sentence.
        block_size: tokens of a block; None with `eos`.
        pad, eos: accepted as in fairseq; blocks are never padded here.
        break_mode: one of BREAK_MODES; None is `none`.
        document_sep_len: size of the sentence that separates documents.

    Attributes:
        slice_indices: int64 [N, 2], each block's place in the corpus seen as one row of tokens.
        block_to_dataset_index: int64 [N, 3], first sentence, offset in it, last sentence.
        sizes: int64 [N].
    """

    def __init__(
        self,
        dataset,
        sizes: np.ndarray | Sequence[int] | torch.Tensor,
        block_size: int | None,
        pad: int | None = None,
        eos: int | None = None,
        break_mode: str | None = None,
        document_sep_len: int = 1,
    ):
        super().__init__()
        mode = break_mode or "none"
        if mode not in BREAK_MODES:
            raise ValueError(f"sample_break_mode {break_mode!r}: choose one of {', '.join(BREAK_MODES)}")
        if mode != "eos" and not (block_size and block_size > 0):
            raise ValueError(f"block_size {block_size}: must be at least 1 with sample_break_mode {mode}")
        sizes = np.asarray(sizes, dtype=np.int64)
        self.dataset = dataset
        self._starts = np.concatenate([[0], np.cumsum(sizes)])  # [S + 1], where each sentence begins
        self.slice_indices = _slice_indices(self._starts, sizes, mode, block_size, document_sep_len)
        self.sizes = self.slice_indices[:, 1] - self.slice_indices[:, 0]

    @property
    def block_to_dataset_index(self) -> np.ndarray:
        if len(self.slice_indices) == len(self._starts) - 1 and (self.slice_indices[:, 0] == self._starts[:-1]).all():
            rows = np.arange(len(self.slice_indices))  # one sentence each, empty ones too
            return np.stack([rows, np.zeros_like(rows), rows], axis=1)
        first, offset = self._locate(self.slice_indices[:, 0])
        last, _ = self._locate(np.maximum(self.slice_indices[:, 1] - 1, self.slice_indices[:, 0]))
        return np.stack([first, offset, last], axis=1)

    def _locate(self, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Sentence and offset of corpus positions; at a boundary, the first sentence that begins there."""
        sentence = np.searchsorted(self._starts, tokens, side="left")
        sentence -= self._starts[sentence] != tokens
        return sentence, tokens - self._starts[sentence]

    def __len__(self) -> int:
        return len(self.slice_indices)

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.from_numpy(self.tokens(index))

    def tokens(self, index: int) -> np.ndarray:
        """The block as a NumPy array, int64: one read of the memory map, since a block's sentences lie side by side."""
        start, stop = (int(x) for x in self.slice_indices[index])
        if hasattr(self.dataset, "token_range"):
            return self.dataset.token_range(start, stop)
        first, last = np.searchsorted(self._starts, [start, stop], side="right") - 1
        sentences = [np.asarray(self.dataset[i]) for i in range(first, min(last + 1, len(self.dataset)))]
        row = np.concatenate([np.zeros(0, np.int64), *sentences])
        return row[start - self._starts[first] :][: stop - start].astype(np.int64)


def _slice_indices(
    starts: np.ndarray, sizes: np.ndarray, mode: str, block_size: int | None, document_sep_len: int
) -> np.ndarray:
    """int64 [N, 2] of (start, stop) tokens, exactly as token_block_utils_fast.pyx makes them."""
    total = int(starts[-1])
    if mode == "eos":
        return np.stack([starts[:-1], starts[1:]], axis=1)
    if mode == "none":
        begin = np.arange(0, total, block_size, dtype=np.int64)
        return np.stack([begin, np.minimum(begin + block_size, total)], axis=1)
    if mode == "complete":
        blocks = _fill(starts, 0, len(sizes), block_size)
        return np.array(blocks, dtype=np.int64).reshape(-1, 2)

    blocks = []
    begin = 0
    for separator in [*np.flatnonzero(sizes == document_sep_len).tolist(), len(sizes)]:
        if separator > begin:
            blocks += _fill(starts, begin, separator, block_size)
        begin = separator + 1
    blocks = np.array(blocks, dtype=np.int64).reshape(-1, 2)
    return blocks[blocks[:, 1] - blocks[:, 0] > 1]


def _fill(starts: np.ndarray, first: int, end: int, block_size: int) -> list[tuple[int, int]]:
    """Fills blocks greedily with the sentences [first, end): a search a block, not a step a sentence."""
    stop = int(starts[end])
    begin = int(starts[first])
    if stop - begin <= block_size:  # most documents
        return [(begin, stop)] if stop > begin else []
    blocks = []
    document = starts[first : end + 1]
    while begin < stop:
        # the last boundary that still fits, else the next one: a sentence longer than a block
        position = int(np.searchsorted(document, begin + block_size, side="right")) - 1
        if document[position] <= begin:
            position = int(np.searchsorted(document, begin, side="right"))
        blocks.append((begin, int(document[position])))
        begin = int(document[position])
    return blocks
