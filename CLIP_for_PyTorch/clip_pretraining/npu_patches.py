"""What the models need on an Ascend NPU, each with its reason. Written against torch_npu 2.13; not run on hardware."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from common.npu import is_npu

# Of the reference's patches, what became of each:
# - NpuLinear, npu_bmmV2, npu_confusion_transpose, FRACTAL_NZ weights: gone. They worked around layout conversions of
#   torch_npu 1.x; `allow_internal_format=False` (common/npu.py) avoids the conversions themselves.
# - NpuFusedAdamW: gone. torch's AdamW(fused=True) has an npu kernel, and does not rebind gradients under DDP.
# - Data_prefetcher: gone. Pinned uint8 batches and non-blocking copies do the same.
# - fast_gelu for RoBERTa: gone. It is x*sigmoid(1.702x), not RoBERTa's erf GELU, and changes the published model's
#   math. CLIP's own quick_gelu *is* that function, so there, and only there, the fused kernel is used.


class FusedQuickGELU(torch.nn.Module):
    """x * sigmoid(1.702 x) in one kernel instead of three; the same function as transformers' QuickGELUActivation."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        import torch_npu

        return torch_npu.npu_fast_gelu(x)


def apply(model: PreTrainedModel, device: torch.device) -> int:
    """Puts the fused activation where the model uses quick_gelu; returns how many were replaced. No-op off the NPU."""
    if not is_npu(device):
        return 0
    places = [
        (module, name)
        for module in model.modules()
        for name, child in module.named_children()
        if type(child).__name__ == "QuickGELUActivation"
    ]
    for module, name in places:
        setattr(module, name, FusedQuickGELU())
    return len(places)
