"""Attention and residual dropout, as formulas; a device's own kernels take their place by name (`*_patches.py`)."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    key_mask: torch.Tensor | None,
    p: float,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """softmax(q k^T / sqrt(D) + bias) v with dropout `p` on the weights. q [B, H, Q, D], k and v [B, H, T, D].

    Args:
        key_mask: bool [B, T], True where keys may be seen; None when all may.
        bias: [H, Q, T], instead of a key mask.
    """
    if key_mask is not None:
        bias = key_mask[:, None, None, :]  # [B, 1, 1, T]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=p)


def dropout_add(x: torch.Tensor, residual: torch.Tensor | None, p: float, training: bool) -> torch.Tensor:
    """residual + dropout(x), or dropout(x) without one."""
    x = F.dropout(x, p, training)
    return x if residual is None else residual + x
