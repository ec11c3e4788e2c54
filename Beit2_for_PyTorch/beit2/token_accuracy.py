"""How many masked patches' tokens a pretrained model predicts, beside always naming their commonest one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch.utils.data import Dataset

from beit2.data.normalizer import Normalizer
from beit2.image_data import collate
from beit2.model.masked_image_model import MaskedImageModel
from beit2.model.tokenizer import VQKD

BATCH = 64


class TokenAccuracy(NamedTuple):
    """Percent of the masked patches: `predicted` right, `commonest` the share of the commonest of their tokens."""

    predicted: float
    commonest: float


@torch.no_grad()
def token_accuracy(
    model: MaskedImageModel,
    tokenizer: VQKD,
    dataset: Dataset,
    pictures: Sequence[int],
    normalizer: Normalizer,
) -> TokenAccuracy:
    """Over the masked patches of the pictures with these numbers, masked as in the first epoch of a training."""
    named, predicted = [], []
    for start in range(0, len(pictures), BATCH):
        batch = collate([dataset[(0, index)] for index in pictures[start : start + BATCH]])
        normalized, visual = normalizer.views(batch)
        mask = batch.mask.flatten(1)  # [B, N]
        logits = model(normalized, mask)  # [M, V], or two of them
        named.append(tokenizer.get_codebook_indices(visual)[mask])
        predicted.append((logits[0] if isinstance(logits, list) else logits).argmax(dim=-1))
    tokens = torch.cat(named)
    right = (torch.cat(predicted) == tokens).double().mean()
    return TokenAccuracy(100 * float(right), 100 * float(tokens.bincount().max() / len(tokens)))
