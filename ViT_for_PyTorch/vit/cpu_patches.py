"""What ViT does differently on a CPU, each change a named behaviour of a block with its reason.

Equal in what they compute (`test/test_block_shortcuts.py`); CPU_PATCHES_OFF=NAME,... leaves patches out.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from common.cpu import cpu_kernels
from common.model.patches import chosen


class _SkippingBlock(Block):
    """A branch is computed for the pictures that keep it only.

    Stochastic depth has the same distribution and the kept pictures the same numbers, for less work: on average by the
    drop rate. Batch sizes that change cost accelerators and compiled code more than they save.
    """

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        if torch.compiler.is_compiling():
            return super().forward(x, attn_mask, is_causal)
        x = _add_branch(x, lambda kept: self.ls1(self.attn(self.norm1(kept), attn_mask, is_causal)), self.drop_path1)
        return _add_branch(x, lambda kept: self.ls2(self.mlp(self.norm2(kept))), self.drop_path2)  # [B, N, C]


class _Bf16Block(Block):
    """bf16 products go through fp32 ones of bf16 values on CPUs without bf16 instructions (common/cpu.py)."""

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        if torch.compiler.is_compiling():
            return super().forward(x, attn_mask, is_causal)
        with cpu_kernels():
            return super().forward(x, attn_mask, is_causal)


def _add_branch(x: Tensor, branch: Callable[[Tensor], Tensor], drop_path: nn.Module) -> Tensor:
    """x + branch(x) [B, N, C] with stochastic depth per picture; draws one number per picture where it applies."""
    rate = getattr(drop_path, "drop_prob", 0.0)
    if rate == 0.0 or not drop_path.training:
        return x + branch(x)
    kept = (torch.rand(len(x)) >= rate).nonzero().squeeze(1)  # indices of pictures
    scale = 1.0 / (1.0 - rate)
    if 0 < len(kept) < len(x):
        return x.index_add(0, kept, branch(x.index_select(0, kept)).to(x.dtype), alpha=scale)
    # with none kept the branch stays in the graph: every rank must have a gradient for every weight
    return x.add(branch(x), alpha=scale if len(kept) else 0.0)


PATCHES = {"skip_dropped_paths": _SkippingBlock, "bf16_kernels": _Bf16Block}


def apply(model: nn.Module, device: torch.device) -> None:
    """Gives the blocks of a model on a CPU their behaviours; nothing is changed elsewhere."""
    if device.type != "cpu":
        return
    for behaviour in chosen(PATCHES, "CPU_PATCHES_OFF").values():
        for block in model.blocks:
            if isinstance(block, Block) and not isinstance(block, behaviour):  # timm has blocks of other kinds, too
                block.__class__ = type(behaviour.__name__, (behaviour, type(block)), {})
