"""Dropout and attention with dropout."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def dropout_add(x: torch.Tensor, residual: torch.Tensor | None, p: float, training: bool) -> torch.Tensor:
    """residual + dropout(x), or dropout(x) without one."""
    if training and p > 0:
        x = F.dropout(x, p)
    return x if residual is None else residual + x


def attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, key_mask: torch.Tensor | None, p: float
) -> torch.Tensor:
    """softmax(q k^T / sqrt(D)) v with dropout `p` on the weights. q [B, H, Q, D], k and v [B, H, T, D].

    key_mask: bool [B, T], True where keys may be seen; None when all may.
    """
    mask = None if key_mask is None else key_mask[:, None, None, :]  # [B, 1, 1, T]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=p)
