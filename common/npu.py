"""Every torch_npu name that more than one project needs, each guarded and explained.

On a machine without torch_npu nothing here is called. What only one project needs lives in its `npu_patches.py`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

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


def open_profiler(folder: Path) -> Any | None:
    """torch_npu's own profiler, which sees the kernels on the card; None where there is none.

    It has `start` and `stop`, and writes a folder `<host>_<pid>_<time>_ascend_pt` into `folder` when it stops.
    `torch.profiler` would see the host's side only.
    """
    try:
        import torch_npu
    except ImportError:
        return None
    if not hasattr(torch_npu, "profiler"):
        return None
    # Level1 adds what each kernel took, by kind, to Level0's timeline
    config = torch_npu.profiler._ExperimentalConfig(profiler_level=torch_npu.profiler.ProfilerLevel.Level1)
    return torch_npu.profiler.profile(
        on_trace_ready=torch_npu.profiler.tensorboard_trace_handler(str(folder)),
        profile_memory=True,
        experimental_config=config,
    )
