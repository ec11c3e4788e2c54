"""The pure losses of image-text pretraining, exact over all ranks.

Every rank holds the same number of pairs. It computes the rows of its own images and its own texts against the
features of all ranks (local rows: memory [b, N] instead of [N, N]); the features are gathered with gradient. After DDP
has averaged the parameter gradients over ranks they equal those of one process that holds the whole batch.
`logit_scale` is everywhere the logarithm of the factor on the cosines, as in checkpoints; the losses exponentiate it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from common import distributed


def contrastive_loss(
    image_embeds: torch.Tensor, text_embeds: torch.Tensor, logit_scale: torch.Tensor | float, scope: str = "global"
) -> torch.Tensor:
    """Symmetric InfoNCE of CLIP (arXiv:2103.00020, figure 3).

    Args:
        image_embeds: [b, d], L2-normalised; row i belongs to row i of text_embeds.
        text_embeds: [b, d], L2-normalised.
        logit_scale: scalar, the log of the factor on the cosines (the model's parameter of that name).
        scope: "global" = negatives from all ranks; "local" = from this rank's batch only, which is what Hugging Face
            and the Ascend reference compute under DDP.

    Returns:
        A scalar. With scope "global" its value is the mean over the global batch on every rank.
    """
    scale = _exp(logit_scale, image_embeds)
    if scope == "local" or distributed.world_size() == 1:
        logits = scale * image_embeds @ text_embeds.T  # [b, b]
        target = torch.arange(len(logits), device=logits.device)
        return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2

    all_images, all_texts = _gather_pair(image_embeds, text_embeds)  # [N, d] each
    target = distributed.rank() * len(image_embeds) + torch.arange(len(image_embeds), device=image_embeds.device)
    image_rows = scale * image_embeds @ all_texts.T  # [b, N]
    text_rows = scale * text_embeds @ all_images.T  # [b, N]
    return _global_value((F.cross_entropy(image_rows, target) + F.cross_entropy(text_rows, target)) / 2)


def siglip_loss(
    image_embeds: torch.Tensor,
    text_embeds: torch.Tensor,
    logit_scale: torch.Tensor | float,
    logit_bias: torch.Tensor | float,
    scope: str = "global",
) -> torch.Tensor:
    """Pairwise sigmoid loss of SigLIP (arXiv:2303.15343, equation 1): -sum log sigmoid(z (s cos + b)) / N.

    Args and result as `contrastive_loss`; `logit_bias` is the scalar b. N is the number of pairs of the global batch.
    """
    scale = _exp(logit_scale, image_embeds)
    texts, first = text_embeds, 0
    if scope == "global" and distributed.world_size() > 1:
        texts = distributed.all_gather_with_grad(text_embeds)  # [N, d]
        first = distributed.rank() * len(image_embeds)
    logits = scale * image_embeds @ texts.T + logit_bias  # [b, N]
    sign = torch.full_like(logits, -1.0)
    sign[:, first : first + len(image_embeds)].fill_diagonal_(1.0)  # the pairs; everything else is a negative
    loss = -F.logsigmoid(sign * logits).sum() / len(image_embeds)
    return _global_value(loss) if scope == "global" else loss


def _exp(logit_scale: torch.Tensor | float, like: torch.Tensor) -> torch.Tensor:
    if isinstance(logit_scale, torch.Tensor):
        return logit_scale.exp()
    return torch.tensor(logit_scale, dtype=like.dtype, device=like.device).exp()


def _gather_pair(image_embeds: torch.Tensor, text_embeds: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Both feature sets of all ranks with one collective."""
    both = distributed.all_gather_with_grad(torch.stack([image_embeds, text_embeds], dim=1))  # [N, 2, d]
    return both[:, 0], both[:, 1]


def _global_value(loss: torch.Tensor) -> torch.Tensor:
    """The gradient of the rank's own loss with the value of the mean over ranks."""
    if distributed.world_size() == 1:
        return loss
    return loss + (distributed.all_reduce_mean(loss) - loss).detach()
