"""Layers by torch_npu's kernels that more than one project needs; what only one needs is in its `npu_patches.py`."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from common.npu import is_npu


def exact_gelu(x: Tensor) -> Tensor:
    """x Phi(x), which `torch.nn.functional.gelu` is on every other device.

    torch_npu's kernel of that name computes the tanh form whatever `approximate` says (its documentation, page of
    npu_gelu), up to 5e-4 away: not the models that were published. torch_npu 2.1 and newer.
    """
    return torch.ops.npu.npu_gelu(x, approximate="none")


class ExactGELU(nn.Module):
    """`exact_gelu` as a module; a copy of the model that has been moved to the host works there."""

    def forward(self, x: Tensor) -> Tensor:
        return exact_gelu(x) if is_npu(x.device) else nn.functional.gelu(x)


def use_exact_gelu(model: nn.Module, kinds: tuple[type[nn.Module], ...] = (nn.GELU,)) -> int:
    """Puts `ExactGELU` where a model has a GELU of these kinds (those set to the tanh form stay); returns how many."""
    return replace_modules(
        model, ExactGELU, lambda m: isinstance(m, kinds) and getattr(m, "approximate", "none") == "none"
    )


def replace_modules(model: nn.Module, make: Callable[[], nn.Module], is_meant: Callable[[nn.Module], bool]) -> int:
    """Replaces every module inside `model` that is meant by a new one; returns how many."""
    places = [(m, name) for m in model.modules() for name, child in m.named_children() if is_meant(child)]
    for module, name in places:
        setattr(module, name, make())
    return len(places)


def fused_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    hidden: Tensor | None = None,
    bias: Tensor | None = None,
    p: float = 0.0,
) -> Tensor:
    """softmax(scale * q k^T + bias) v with dropout `p`, by torch_npu's fused kernel.

    For what torch_npu does not fuse by itself: `scaled_dot_product_attention` with a float mask. The kernel has its own
    conventions: it adds `pse` before it scales, so the bias goes in divided by the scale; and its mask is True where a
    key is hidden, the inverse of torch's. The keywords are the same in torch_npu 2.1 to 2.14.

    Args:
        q: fp16 or bf16 [B, H, Q, D]; k, v: [B, H, T, D].
        hidden: bool [B or 1, H or 1, Q, T].
        bias: [B or 1, H, Q, T]. It gets no gradient.

    Raises:
        ValueError: a bias that is to be trained: the kernel leaves its gradient unwritten (CANN's documentation of
            aclnnFlashAttentionScoreGrad, dpseOut).
    """
    if bias is not None:
        if bias.requires_grad and torch.is_grad_enabled():
            raise ValueError("npu_fusion_attention has no gradient for a bias: use scaled_dot_product_attention")
        bias = (bias / scale).to(q.dtype)
    return torch.ops.npu.npu_fusion_attention(
        q, k, v, q.shape[1], "BNSD", pse=bias, atten_mask=hidden, scale=scale, keep_prob=1.0 - p
    )[0]
