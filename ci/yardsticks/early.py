"""Quality early in a demo: what shows after a few epochs that it does not learn as it did."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Early:
    """One number of an early evaluation.

    Attributes:
        metric: its key in demo.json.
        key: its key in the evaluations of metrics.jsonl.
        evaluation: which of them, the first being 1.
        factor: from there to percent.
    """

    metric: str
    key: str
    evaluation: int
    factor: float = 1.0

    def read(self, evaluations: Sequence[Mapping[str, float]]) -> dict[str, float]:
        """{metric: percent}; empty before that evaluation."""
        if len(evaluations) < self.evaluation:
            return {}
        return {self.metric: self.factor * evaluations[self.evaluation - 1][self.key]}


EARLY = {
    "ViT_for_PyTorch": Early("top1_early", "top1", 5),  # after 25 of 80 epochs
    "CLIP_for_PyTorch": Early("text_to_image_R@1_early", "eval_text_to_image_R@1", 1, 100.0),  # after 1 of 9
}
