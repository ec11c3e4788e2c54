"""What a card of Ascend is and does otherwise: its generation, settings of the process, limits of its collectives.

On a machine without torch_npu nothing here is called. Layers for it are in model/npu_layers.py.
"""

from __future__ import annotations

import os
import re

import torch


def is_npu(device: torch.device) -> bool:
    return device.type == "npu"


def _is_first_generation(device: torch.device) -> bool:
    """Atlas training series (Ascend910A, 910ProB ...); 910B1 to B4 (A2), 910_93xx (A3) and 950 came later."""
    return not re.match(r"Ascend(910B\d|910_\d|9[5-9]\d)", torch.npu.get_device_name(device))


def has_bf16(device: torch.device) -> bool:
    return not _is_first_generation(device)


def has_fused_adamw(device: torch.device) -> bool:
    """Whether the card has aclnnApplyAdamWV2, which CANN documents for Atlas A2, A3 and 950 only."""
    return not _is_first_generation(device)


def take_overflow(device: torch.device) -> bool:
    """Whether an fp16 result was cut at 65504 since the last call; waits for the device.

    The first generation saturates where others give inf, so a gradient that overflowed has a finite norm there; the
    card only sets a flag (op-plugin, AmpForeachNonFiniteCheckAndUnscaleKernelNpuOpApi.cpp). Others: always False.
    """
    if not _is_first_generation(device):
        return False
    found = bool(torch.npu.get_npu_overflow_flag())
    torch.npu.clear_npu_overflow_flag()
    return found


def set_up() -> None:
    """Process-wide torch_npu settings, made once when an npu device is resolved.

    - `jit_compile=False`: use the precompiled operator kernels. With jit compilation every new shape costs seconds, and
      BEiT, CLIP and data2vec batches do change shape.
    - `allow_internal_format=False`: keep tensors in their plain layout. The private formats speed up some convolutions,
      but our models have a single one (the patch embedding) and pay for every conversion around it.
    - `conv.allow_hf32=False`: fp32 means fp32. torch_npu multiplies an fp32 convolution in HF32 (11 bits of mantissa)
      unless told otherwise (Ascend/pytorch, EnvVariables.cpp, ALLOW_CONV_HF32), and the patch embedding is one.
      Products of matrices are in fp32 already. fp16 and bf16 are not touched.
    """
    torch.npu.set_compile_mode(jit_compile=False)
    torch.npu.config.allow_internal_format = False
    torch.npu.conv.allow_hf32 = False


def deterministic() -> None:
    """Level 1 of torch_npu 2.13 and newer: the same bits in each run; level 2 would also hold over shapes."""
    if hasattr(torch.npu, "set_deterministic_level"):
        torch.npu.set_deterministic_level(1)


def group_timeouts(to_meet: int, collective: int) -> tuple[int, int]:
    """(seconds of the process group, seconds that a collective really has) on npu.

    HCCL's own limits rule, and the group's has to be larger than both (CANN's page of HCCL_ASYNC_ERROR_HANDLING), else
    the group ends the run before HCCL has said which rank is missing. 120 and 1836 s are HCCL's defaults.
    """
    connect, execute = (int(os.environ.get(f"HCCL_{n}_TIMEOUT") or d) for n, d in (("CONNECT", 120), ("EXEC", 1836)))
    return max(to_meet, connect + 60, execute + 60), execute
