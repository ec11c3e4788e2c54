"""Retrieval without learning: a picture is described by the words of the training pictures that look most like it.

Looks are raw pixels (`pixels`); words are weighted by rarity (tf-idf); ties count half, so that a method that cannot
tell pictures apart gets what guessing gets.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ci.yardsticks import pixels

NEIGHBOURS = 60
_SHARPNESS = 4  # power of the cosine by which a neighbour's words count
RECALLS = (1, 5, 10)


def read_table(path: Path) -> tuple[list[Path], list[list[str]]]:
    """A .jsonl of `image_path` and `caption`: the pictures, each once, and their captions."""
    captions: dict[str, list[str]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        captions.setdefault(row["image_path"], []).append(row["caption"])
    return [path.parent / name for name in captions], list(captions.values())


def retrieval(train: Path, val: Path) -> dict[str, dict[str, float]]:
    """Recalls in percent on the table `val` from the table `train`.

    Returns:
        {"guessing" or "words_of_nearest": {"text_to_image_R@k": ..., "image_to_text_R@k": ...}}
    """
    known_paths, known = read_table(train)
    asked_paths, wanted = read_table(val)
    near = pixels.similarities(pixels.thumbnails(known_paths), pixels.thumbnails(asked_paths))  # [V, T]
    place = {word: i for i, word in enumerate(sorted(set().union(*map(_words, known))))}
    table = np.stack([_counts(captions, place) for captions in known])  # [T, W]
    rarity = np.log(len(table) / (1 + table.sum(0)))  # [W]
    table *= rarity
    described = np.stack([_described(row, table) for row in near])  # [V, W]
    queries = np.stack([_counts([text], place) * rarity for captions in wanted for text in captions])  # [Q, W]
    owner = np.array([i for i, captions in enumerate(wanted) for _ in captions])  # [Q]
    scores = pixels.unit(described) @ pixels.unit(queries).T  # [V, Q]
    guess = {f"{way}_R@{k}": 100 * k / len(wanted) for way in ("text_to_image", "image_to_text") for k in RECALLS}
    return {"guessing": guess, "words_of_nearest": recalls(scores, owner)}


def recalls(scores: np.ndarray, owner: np.ndarray) -> dict[str, float]:
    """Recalls in percent, both ways, from scores [V, Q]; query q describes picture owner[q]; ties count half."""
    right = scores[owner, np.arange(len(owner))]  # [Q]
    of_text = (scores > right).sum(0) + ((scores == right).sum(0) - 1) / 2  # [Q]
    own = owner[None] == np.arange(len(scores))[:, None]  # [V, Q]
    best = np.where(own, scores, -np.inf).max(1, keepdims=True)  # [V, 1]
    others = ~own  # the best of a picture's own captions against all captions of other pictures
    of_image = ((scores > best) & others).sum(1) + ((scores == best) & others).sum(1) / 2  # [V]
    found = {f"text_to_image_R@{k}": 100 * float((of_text < k).mean()) for k in RECALLS}
    return found | {f"image_to_text_R@{k}": 100 * float((of_image < k).mean()) for k in RECALLS}


def _described(near: np.ndarray, table: np.ndarray) -> np.ndarray:
    """The words [W] of the most similar training pictures, by their similarity [T]."""
    order = np.argsort(-near)[:NEIGHBOURS]
    return (table[order] * np.maximum(near[order], 0)[:, None] ** _SHARPNESS).sum(0)


def _words(captions: Sequence[str]) -> set[str]:
    """Of Chinese, which has no spaces, every sign."""
    return {word for caption in captions for word in re.findall("[a-z0-9]+|[\u4e00-\u9fff]", caption.lower())}


def _counts(captions: Sequence[str], place: dict[str, int]) -> np.ndarray:
    row = np.zeros(len(place), np.float32)
    row[[place[word] for word in _words(captions) if word in place]] = 1
    return row
