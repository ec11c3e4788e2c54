"""What differs on an Ascend device, applied once after the model is built; nothing elsewhere."""

from __future__ import annotations

import torch

from common import npu


def apply(model: torch.nn.Module, device: torch.device) -> None:
    if not npu.is_npu(device):
        return
