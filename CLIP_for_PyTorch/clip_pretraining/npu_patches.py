"""What the models need on an Ascend NPU, each change a named function with its reason.

NPU_PATCHES_OFF=NAME,... leaves patches out. Run on a simulated npu device (ci/npu/fake), not on Ascend hardware.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.activations import GELUActivation, QuickGELUActivation

from common import npu
from common.model import npu_layers
from common.model.patches import chosen

# Of the reference's patches, what became of each:
# - NpuLinear, npu_bmmV2, npu_confusion_transpose, FRACTAL_NZ weights: gone. They worked around layout conversions of
#   torch_npu 1.x; `allow_internal_format=False` (common/npu.py) avoids the conversions themselves.
# - NpuFusedAdamW: gone. torch's AdamW(fused=True) has an npu kernel, and does not rebind gradients under DDP.
# - Data_prefetcher: gone. Pinned uint8 batches and non-blocking copies do the same.
# - fast_gelu for RoBERTa: gone. It is x*sigmoid(1.702x), not RoBERTa's erf GELU, and changes the published model's
#   math. CLIP's own quick_gelu *is* that function, so there, and only there, the fused kernel is used.


class FusedQuickGELU(nn.Module):
    """x * sigmoid(1.702 x) in one kernel instead of three; the same function as transformers' QuickGELUActivation."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.ops.npu.npu_fast_gelu(x)


def use_fused_quick_gelu(model: PreTrainedModel) -> int:
    """CLIP's activation in one kernel; returns how many were replaced. torch_npu 2.1 and newer."""
    return npu_layers.replace_modules(model, FusedQuickGELU, lambda m: isinstance(m, QuickGELUActivation))


def use_exact_gelu(model: PreTrainedModel) -> int:
    """RoBERTa's activation; torch_npu's gelu is the tanh form whatever is asked for (npu_layers.py)."""
    return npu_layers.use_exact_gelu(model, (nn.GELU, GELUActivation))


PATCHES = {"exact_gelu": use_exact_gelu, "quick_gelu": use_fused_quick_gelu}


def apply(model: PreTrainedModel, device: torch.device) -> int:
    """Prepares a model on its device and returns how many modules were replaced; none on cuda and cpu."""
    return sum(patch(model) for patch in chosen(PATCHES, "NPU_PATCHES_OFF").values()) if npu.is_npu(device) else 0
