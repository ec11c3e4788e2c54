"""What is measured: top-1/top-5 as exact counts, and the classification loss."""

import torch
import torch.nn.functional as F
from torch import Tensor


def topk_correct(logits: Tensor, target: Tensor) -> Tensor:
    """int64 [3] on the logits' device: top-1 hits, top-5 hits, pictures. Add these over batches and ranks, then divide.

    logits [B, C], target int [B]; rows with a negative target (padding) count nowhere. With fewer than 5 classes
    every picture is a top-5 hit. A tie never helps: a class with the target's logit stands before it.
    """
    counted = target >= 0  # [B]
    own = logits.gather(1, target.clamp(min=0).unsqueeze(1))  # [B, 1]
    before = (logits >= own).sum(1) - 1  # [B] classes at least as likely as the target; -1 where its logit is nan
    top1, top5 = ((before >= 0) & (before < k) & counted for k in (1, 5))  # [B] each
    return torch.stack([top1.sum(), top5.sum(), counted.sum()])


def topk_counts(logits: Tensor, target: Tensor) -> dict[str, int]:
    """`topk_correct` as Python integers {"top1", "top5", "count"} (waits for the device)."""
    top1, top5, count = topk_correct(logits, target).tolist()
    return {"top1": top1, "top5": top5, "count": count}


def soft_target_cross_entropy(logits: Tensor, target: Tensor, weights: Tensor | None = None) -> Tensor:
    """Mean cross entropy of logits [B, C] against probabilities [B, C] (mixup) or class indices [B], in fp32.

    weights [C] multiply the classes' terms.
    """
    return F.cross_entropy(logits.float(), target, weight=weights)
