"""Every torch_npu name that more than one project needs, each guarded and explained.

On a machine without torch_npu nothing here is called. What only one project needs lives in its `npu_patches.py`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from common import patches as device_patches


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


def chosen(patches: Mapping[str, Callable]) -> dict[str, Callable]:
    """The patches that NPU_PATCHES_OFF=NAME,NAME does not name."""
    return device_patches.chosen(patches, "NPU_PATCHES_OFF")


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


def open_profiler(folder: Path, steps: int) -> Any | None:
    """torch_npu's own profiler, which sees the kernels on the card; None where there is none.

    It has `start`, `step` and `stop`, and after so many steps writes a folder `<host>_<pid>_<time>_ascend_pt` into
    `folder`. `torch.profiler` would see the host's side only.
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
        schedule=torch_npu.profiler.schedule(wait=0, active=steps, repeat=1),
        on_trace_ready=torch_npu.profiler.tensorboard_trace_handler(str(folder)),
        profile_memory=True,
        experimental_config=config,
    )
