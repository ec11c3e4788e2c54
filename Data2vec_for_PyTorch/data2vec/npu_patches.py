"""What an Ascend device needs beyond the common set-up. (Written, not yet run on Ascend hardware.)

Indices of masked tokens are made on the host by the loader for every device (`plan_batch`), so the model has no boolean
index and no `.any()` that would wait for the device; attention goes through `scaled_dot_product_attention`, which
torch_npu maps to its fused kernel.
"""

from __future__ import annotations

import torch
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
