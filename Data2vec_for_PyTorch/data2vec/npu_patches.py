"""What an Ascend device needs beyond the common set-up. (Run on a simulated npu device only, not on Ascend hardware.)

Indices of masked tokens are made on the host by the loader for every device (`plan_batch`), so the model has no boolean
index and no `.any()` that would wait for the device.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from omegaconf import DictConfig

from common import npu

LENGTH_MULTIPLE = 64


def use_length_buckets(config: DictConfig, device: torch.device) -> str | None:
    """Pads batches to a few lengths, so that operators are compiled for a few shapes; returns a note when it does.

    Pads are hidden from attention: results do not change. A multiple that the user set stays.
    """
    if not npu.is_npu(device) or config.dataset.required_seq_len_multiple != 1:
        return None
    config.dataset.required_seq_len_multiple = LENGTH_MULTIPLE
    return f"npu: batches are padded to multiples of {LENGTH_MULTIPLE} tokens (dataset.required_seq_len_multiple)"


def fused_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    key_mask: torch.Tensor | None,
    p: float,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """`dropout.attention` by torch_npu's fused kernel; same arguments and result.

    The kernel's mask is True where keys are hidden, the inverse of torch's, and its scale defaults to 1. torch_npu also
    fuses `scaled_dot_product_attention` by itself, but only says so for masks of the weights' full size. In fp32, and
    for a trainable bias (the kernel is not known to have a gradient for `pse`), attention stays torch's.
    """
    trainable = bias is not None and bias.requires_grad and torch.is_grad_enabled()
    if trainable or q.dtype not in (torch.float16, torch.bfloat16):
        mask = bias if key_mask is None else key_mask[:, None, None, :]  # [B, 1, 1, T]
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=p)
    rows, heads, queries, dim = q.shape
    hidden = None
    if key_mask is not None:
        hidden = ~key_mask[:, None, None, :].expand(-1, 1, queries, -1)  # [B, 1, Q, T]
    if bias is not None:
        bias = bias.to(q.dtype).expand(rows, -1, -1, -1).contiguous()  # [B, H, Q, T]
    k, v = k.to(q.dtype), v.to(q.dtype)
    return torch.ops.npu.npu_fusion_attention(
        q, k, v, heads, "BNSD", pse=bias, atten_mask=hidden, scale=dim**-0.5, keep_prob=1.0 - p
    )[0]
