"""What counting alone knows of a hidden token: how often each common token stood between the same neighbours."""

from __future__ import annotations

import numpy as np

NOT_VISIBLE = -1  # a neighbour that is hidden, too, or outside the block
MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)
LEAST_SEEN = 4  # times that two neighbours on each side were seen, below which one on each side is asked


class CountTable:
    """Counts of the training text: of (left, token, right), (left, token) and (token, right). Learns no features.

    Args:
        corpus: int64 [T], the training text.
        common: int64 [K], the tokens that may be answered, the commonest first.
    """

    def __init__(self, corpus: np.ndarray, common: np.ndarray):
        self.size = int(max(corpus.max(), common.max())) + 1
        place = np.full(self.size, -1)
        place[common] = np.arange(len(common))
        self.classes = len(common)
        a, b, c = corpus[:-2], place[corpus[1:-1]], corpus[2:]
        a, b, c = a[b >= 0], b[b >= 0], c[b >= 0]
        self.frequency = np.bincount(b, minlength=self.classes)  # [K]
        self.left = self._pairs(a, b)
        self.right = self._pairs(c, b)
        self.both = np.unique((a * self.size + c) * self.classes + b, return_counts=True)

    def _pairs(self, neighbour: np.ndarray, token: np.ndarray) -> np.ndarray:
        counts = np.bincount(neighbour * self.classes + token, minlength=self.size * self.classes)
        return counts.reshape(self.size, self.classes)  # [V, K]

    def guess(self, left: int, right: int) -> int:
        """The place in `common` of the likeliest token between two neighbours, each of them maybe NOT_VISIBLE."""
        left, right = (n if n < self.size else NOT_VISIBLE for n in (left, right))  # not in the training text at all
        if left == right == NOT_VISIBLE:
            return 0
        if NOT_VISIBLE in (left, right):
            return int((self.right[right] if left == NOT_VISIBLE else self.left[left]).argmax())
        scores = self._between(left, right)
        if scores.sum() < 2:  # too rare a pair: as if the neighbours were independent given the token
            scores = (self.left[left] + 0.1) * (self.right[right] + 0.1) / self.frequency.clip(1)
        return int(scores.argmax())

    def _between(self, left: int, right: int) -> np.ndarray:
        keys, counts = self.both
        first = (left * self.size + right) * self.classes
        found = slice(*np.searchsorted(keys, (first, first + self.classes)))
        scores = np.zeros(self.classes)
        scores[keys[found] - first] = counts[found]
        return scores


def guess_of_four(corpus: np.ndarray, common: np.ndarray, around: np.ndarray) -> np.ndarray:
    """What a table of two neighbours on each side knows where it has seen them LEAST_SEEN times.

    Args:
        corpus, common: as of CountTable.
        around: int64 [N, 4], the neighbours at -2, -1, 1 and 2, each of them maybe NOT_VISIBLE: those count that are
            in view.

    Returns:
        int64 [N]: places in `common`, -1 where these neighbours were seen too rarely.
    """
    place = np.full(int(max(corpus.max(), common.max())) + 1, -1)
    place[common] = np.arange(len(common))
    token = place[corpus[2:-2]]  # [T - 4]
    bits = np.uint64(len(common).bit_length())
    beside = [corpus[:-4], corpus[1:-3], corpus[3:-1], corpus[4:]]
    guesses = np.full(len(around), -1)
    visible = around != NOT_VISIBLE
    for pattern in np.unique(visible, axis=0):
        asked = np.flatnonzero((visible == pattern).all(axis=1))
        context = _keys([beside[i] for i in np.flatnonzero(pattern)], len(token))
        wanted = _keys(list(around[asked][:, pattern].T), len(asked))
        seen = np.sort(context[token >= 0] << bits | token[token >= 0].astype(np.uint64))
        first, last = np.searchsorted(seen, wanted << bits), np.searchsorted(seen, (wanted << bits) + (1 << bits))
        for i in np.flatnonzero(last - first >= LEAST_SEEN):
            guesses[asked[i]] = np.bincount((seen[first[i] : last[i]] & ((1 << bits) - 1)).astype(int)).argmax()
    return guesses


def _keys(columns: list[np.ndarray], rows: int) -> np.ndarray:
    """uint64 [rows]: one number for what stands in the columns [rows each]; two rows have the same by rare chance."""
    key = np.zeros(rows, np.uint64)
    for column in columns:
        key = key * MULTIPLIER + column.astype(np.uint64)
    return key
