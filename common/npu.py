"""Every torch_npu name that more than one project needs, each guarded and explained.

On a machine without torch_npu nothing here is called. What only one project needs lives in its `npu_patches.py`.
"""

from __future__ import annotations

import torch


def is_npu(device: torch.device) -> bool:
    return device.type == "npu"


def set_up() -> None:
    """Process-wide torch_npu settings, made once when an npu device is resolved.

    - `jit_compile=False`: use the precompiled operator kernels. With jit compilation every new shape costs seconds, and
      BEiT, CLIP and data2vec batches do change shape.
    - `allow_internal_format=False`: keep tensors in their plain layout. The private formats speed up some convolutions,
      but our models have a single one (the patch embedding) and pay for every conversion around it.
    """
    torch.npu.set_compile_mode(jit_compile=False)
    torch.npu.config.allow_internal_format = False
