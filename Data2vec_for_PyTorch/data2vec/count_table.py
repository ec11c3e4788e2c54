"""What counting alone knows of a hidden token: how often each common token stood between these two neighbours."""

from __future__ import annotations

import numpy as np


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

    def guess(self, left: int | None, right: int | None) -> int:
        """The place in `common` of the likeliest token; None is a neighbour that is hidden, too."""
        if left is None and right is None:
            return 0
        if left is None or right is None:
            return int((self.right[right] if left is None else self.left[left]).argmax())
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
