"""--compile: the blocks under torch.compile while they train; nothing in the models knows of it.

Dropped paths are drawn outside the graph, in the order in which eager blocks draw them: the same seed drops the same.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor, nn

from beit2.model.blocks import Block, take_rows
from common.model.compilation import compiled


def compile_blocks(model: nn.Module, device: torch.device) -> None:
    """Lets all blocks of a model go through one compiled function. After the device's patches.

    Raises:
        UsageError: where torch.compile cannot work.
    """
    run = compiled(run_block, device)
    for module in model.modules():
        if isinstance(module, Block):
            module.forward = functools.partial(forward, module, run, module.forward)


def forward(
    block: Block,
    run: Callable,
    eager: Callable,
    x: Tensor,
    shared_bias: Tensor | None = None,
    rows: Tensor | None = None,
) -> Tensor:
    """`Block.forward`; without gradients, as in an evaluation, what that was before."""
    if not (block.training and torch.is_grad_enabled()):
        return eager(x, shared_bias, rows)
    return run(block, x, shared_bias, rows, branch_weights(block, x), branch_weights(block, x))


def branch_weights(block: Block, x: Tensor) -> Tensor:
    """What a branch counts for every sample: 0 where it is dropped, else 1 / its share of samples. [B, 1, 1]."""
    keep = 1 - block.drop_prob
    weights = x.new_ones(len(x), 1, 1)
    return weights if keep == 1 else weights.bernoulli_(keep).div_(keep)


def run_block(
    block: Block, x: Tensor, shared_bias: Tensor | None, rows: Tensor | None, attention: Tensor, mlp: Tensor
) -> Tensor:
    """`Block.forward` with the weights [B, 1, 1] of its two branches given."""
    out = x if rows is None else take_rows(x, rows)
    out = out + block._attention(x, rows, shared_bias) * attention
    return out + block._mlp(out) * mlp
