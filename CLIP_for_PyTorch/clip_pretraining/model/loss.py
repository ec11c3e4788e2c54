"""The pure losses of image-text pretraining, exact over all ranks.

Every rank holds the same number of pairs. It computes the rows of its own images and its own texts against the
features of all ranks (local rows: memory [b, N] instead of [N, N]); the features are gathered with gradient. After DDP
has averaged the parameter gradients over ranks they equal those of one process that holds the whole batch.

Large batches go through tiled_loss.py, whose memory is linear in the batch. `logit_scale` is everywhere the logarithm
of the factor on the cosines, as in checkpoints; the losses exponentiate it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from clip_pretraining.model.tiled_loss import TiledContrastive, TiledSigmoid, hide_equal_captions
from common import distributed

TILED_FROM = 2**22  # logits of a rank: from 2048 pairs on, or 724 on each of eight ranks. Below it nothing is saved


def contrastive_loss(
    image_embeds: torch.Tensor,
    text_embeds: torch.Tensor,
    logit_scale: torch.Tensor | float,
    scope: str = "global",
    caption_ids: torch.Tensor | None = None,
) -> torch.Tensor:
    """Symmetric InfoNCE of CLIP (arXiv:2103.00020, figure 3).

    Args:
        image_embeds: [b, d], L2-normalised; row i belongs to row i of text_embeds.
        text_embeds: [b, d], L2-normalised.
        logit_scale: scalar, the log of the factor on the cosines (the model's parameter of that name).
        scope: "global" = negatives from all ranks; "local" = from this rank's batch only, which is what Hugging Face
            and the Ascend reference compute under DDP.
        caption_ids: int64 [b], equal where captions are: a caption that stands for several pictures of the batch is
            then no negative of them. None: every other pair is a negative, as in the paper.

    Returns:
        A scalar. With scope "global" its value is the mean over the global batch on every rank.
    """
    scale = _exp(logit_scale, image_embeds)
    if _is_large(image_embeds, scope):
        return _value(TiledContrastive.apply(image_embeds, text_embeds, scale, caption_ids, scope), scope)
    if scope == "local" or distributed.world_size() == 1:
        logits = _masked(scale * image_embeds @ text_embeds.T, caption_ids, caption_ids, 0)  # [b, b]
        target = torch.arange(len(logits), device=logits.device)
        return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2

    all_images, all_texts = _gather_pair(image_embeds, text_embeds)  # [N, d] each
    ids_of_all = None if caption_ids is None else distributed.all_gather_with_grad(caption_ids)  # [N]
    first = distributed.rank() * len(image_embeds)
    target = first + torch.arange(len(image_embeds), device=image_embeds.device)
    image_rows = _masked(scale * image_embeds @ all_texts.T, caption_ids, ids_of_all, first)  # [b, N]
    text_rows = _masked(scale * text_embeds @ all_images.T, caption_ids, ids_of_all, first)  # [b, N]
    return _value((F.cross_entropy(image_rows, target) + F.cross_entropy(text_rows, target)) / 2, scope)


def siglip_loss(
    image_embeds: torch.Tensor,
    text_embeds: torch.Tensor,
    logit_scale: torch.Tensor | float,
    logit_bias: torch.Tensor | float,
    scope: str = "global",
    caption_ids: torch.Tensor | None = None,
) -> torch.Tensor:
    """Pairwise sigmoid loss of SigLIP (arXiv:2303.15343, equation 1): -sum log sigmoid(z (s cos + b)) / N.

    Args and result as `contrastive_loss`; `logit_bias` is the scalar b. N is the number of pairs of the global batch.
    """
    scale = _exp(logit_scale, image_embeds)
    if _is_large(image_embeds, scope):
        bias = torch.as_tensor(logit_bias, dtype=image_embeds.dtype, device=image_embeds.device)
        return _value(TiledSigmoid.apply(image_embeds, text_embeds, scale, bias, caption_ids, scope), scope)
    texts, ids_of_all, first = text_embeds, caption_ids, 0
    if scope == "global" and distributed.world_size() > 1:
        texts = distributed.all_gather_with_grad(text_embeds)  # [N, d]
        ids_of_all = None if caption_ids is None else distributed.all_gather_with_grad(caption_ids)
        first = distributed.rank() * len(image_embeds)
    logits = _masked(scale * image_embeds @ texts.T + logit_bias, caption_ids, ids_of_all, first)  # [b, N]
    sign = torch.full_like(logits, -1.0)
    sign[:, first : first + len(image_embeds)].fill_diagonal_(1.0)  # the pairs; everything else is a negative
    return _value(-F.logsigmoid(sign * logits).sum() / len(image_embeds), scope)


def _is_large(embeds: torch.Tensor, scope: str) -> bool:
    columns = len(embeds) * (distributed.world_size() if scope == "global" else 1)
    return len(embeds) * columns >= TILED_FROM


def _masked(
    logits: torch.Tensor, ids: torch.Tensor | None, ids_of_all: torch.Tensor | None, first: int
) -> torch.Tensor:
    return logits if ids is None else hide_equal_captions(logits, ids, ids_of_all, first)


def _exp(logit_scale: torch.Tensor | float, like: torch.Tensor) -> torch.Tensor:
    if isinstance(logit_scale, torch.Tensor):
        return logit_scale.exp()
    return torch.tensor(logit_scale, dtype=like.dtype, device=like.device).exp()


def _gather_pair(image_embeds: torch.Tensor, text_embeds: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Both feature sets of all ranks with one collective."""
    both = distributed.all_gather_with_grad(torch.stack([image_embeds, text_embeds], dim=1))  # [N, 2, d]
    return both[:, 0], both[:, 1]


def _value(loss: torch.Tensor, scope: str) -> torch.Tensor:
    """The gradient of the rank's own loss; with scope "global" the value of the mean over ranks."""
    if scope == "local" or distributed.world_size() == 1:
        return loss
    return loss + (distributed.all_reduce_mean(loss) - loss).detach()
