"""What ViT does differently on an Ascend NPU, each change a named function with its reason.

There is little to do: torch_npu fuses `scaled_dot_product_attention` by itself for our case ([B, H, N, D], no mask),
has a fused AdamW kernel, and nothing in the training step has a shape that depends on data.
NPU_PATCHES_OFF=NAME,... leaves patches out. Run on a simulated npu device (ci/npu/fake), not on Ascend hardware.
"""

from __future__ import annotations

import torch
from timm.layers import use_fused_attn
from torch import nn

from common import npu
from common.model import npu_layers
from common.model.patches import chosen


def require_fused_attention(model: nn.Module) -> None:
    """Every attention layer must go through `scaled_dot_product_attention`, the only path that torch_npu fuses.

    timm falls back to separate matmul and softmax when TIMM_FUSED_ATTN=0 is set: several times the memory on a card.
    torch_npu 2.6 and newer fuse it.
    """
    for name, module in model.named_modules():
        if hasattr(module, "fused_attn") and not module.fused_attn:
            raise RuntimeError(f"{name} does not use fused attention (timm: {use_fused_attn()}): unset TIMM_FUSED_ATTN")


PATCHES = {"exact_gelu": npu_layers.use_exact_gelu, "require_fused_attention": require_fused_attention}


def apply(model: nn.Module, device: torch.device) -> None:
    """Prepares a model on its device; nothing is changed on cuda and cpu."""
    if npu.is_npu(device):
        for patch in chosen(PATCHES, "NPU_PATCHES_OFF").values():
            patch(model)
