"""Retrieval as a picture: a row a caption, what it should find, and the pictures that score highest."""

from __future__ import annotations

from pathlib import Path

import torch

from clip_pretraining.data.pairs import ImageSource, Pairs
from common.run.figures import fonts_for, new, save

QUERIES, ANSWERS = 6, 5
RULE = "captions at equal distances in the split's order; green: the right picture"


def draw(image: torch.Tensor, text: torch.Tensor, pairs: Pairs, pictures: ImageSource, path: Path) -> None:
    """Writes a PNG of QUERIES captions and the pictures they retrieve.

    The captions are not picked: they stand at equal distances in the split, the first half a distance from its start.

    Args:
        image, text: features [I, d] and [T, d], L2-normalised, of the pictures and captions of `pairs`.
        pictures: uint8 [3, S, S] by position.
    """
    count, answers = min(QUERIES, len(pairs)), min(ANSWERS, len(image))
    queries = [(2 * place + 1) * len(pairs) // (2 * count) for place in range(count)]
    with fonts_for(pairs.captions[query][:90] for query in queries):
        figure, axes = new((1.7 * (1 + answers), 2.2 * count), count, 1 + answers, squeeze=False)
        figure.get_layout_engine().set(h_pad=0.18)
        figure.suptitle(f"{len(image)} pictures, {len(pairs)} captions; {RULE}", fontsize=9)
        for query, row in zip(queries, axes, strict=True):
            _row(row, query, text[query] @ image.T, pairs, pictures)
        save(figure, path)


def _row(row, query: int, scores: torch.Tensor, pairs: Pairs, pictures: ImageSource) -> None:
    """A caption, what it should find, and the pictures that score highest; scores [I]."""
    right = int(pairs.image_of_caption[query])
    equal = (scores == scores[right]).sum() - 1  # half of them count, as in retrieval.py
    rank = 1 + int((scores > scores[right]).sum() + equal // 2)
    _show(row[0], pictures[right], "tab:green", f"asked: {_ordinal(rank)}")
    title = row[0].set_title(f"“{pairs.captions[query][:90]}”", loc="left", fontsize=9)
    title.set_in_layout(False)  # it may be wider than its column
    for axis, score, index in zip(row[1:], *(part.tolist() for part in scores.topk(len(row) - 1)), strict=True):
        _show(axis, pictures[index], "tab:green" if index == right else "lightgrey", f"{score:.2f}")


def _show(axis, picture: torch.Tensor, frame: str, below: str) -> None:
    axis.imshow(picture.permute(1, 2, 0).numpy())
    for side in axis.spines.values():
        side.set(color=frame, linewidth=1 if frame == "lightgrey" else 4)
    axis.set(xticks=[], yticks=[], xlabel=below)


def _ordinal(number: int) -> str:
    ending = "th" if number // 10 % 10 == 1 else {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    return f"{number}{ending}"
