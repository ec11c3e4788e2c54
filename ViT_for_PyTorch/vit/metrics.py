"""What is measured: top-1/top-5 as exact counts, and the classification loss."""

import torch
import torch.nn.functional as F
from torch import Tensor


def topk_correct(logits: Tensor, target: Tensor) -> Tensor:
    """int64 [3] on the logits' device: top-1 hits, top-5 hits, pictures. Add these over batches and ranks, then divide.

    logits [B, C], target int [B]; rows with a negative target (padding) count nowhere. With fewer than 5 classes
    every picture is a top-5 hit.
    """
    top = logits.topk(min(5, logits.shape[1]), dim=1).indices  # [B, 5]
    hits = top == target.unsqueeze(1)  # [B, 5]
    return torch.stack([hits[:, 0].sum(), hits.sum(), (target >= 0).sum()])


def topk_counts(logits: Tensor, target: Tensor) -> dict[str, int]:
    """`topk_correct` as Python integers {"top1", "top5", "count"} (waits for the device)."""
    top1, top5, count = topk_correct(logits, target).tolist()
    return {"top1": top1, "top5": top5, "count": count}


def soft_target_cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """Mean cross entropy of logits [B, C] against probabilities [B, C] (mixup) or class indices [B], in fp32."""
    return F.cross_entropy(logits.float(), target)
