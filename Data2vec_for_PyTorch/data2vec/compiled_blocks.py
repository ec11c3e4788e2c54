"""--compile: the blocks of student and teacher under torch.compile; nothing in the models knows of it.

A run makes two graphs, or four where the last block works on some rows alone: student and teacher each have their own.
Rows, lengths and numbers of masked tokens differ from batch to batch, so sizes are symbols in the graphs; text is
padded to a few lengths, since kernels are chosen by what divides a length. Dropped paths are drawn outside the graph.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from common.model.compilation import compiled
from data2vec.model.encoder import EncoderLayer, Rows
from data2vec.model.multi.block import Block
from data2vec.model.transformer_block import TransformerBlock, blocks_of

Results = tuple[Tensor, Tensor]
Compiled = dict[Callable, Callable]


def compile_blocks(model: nn.Module, device: torch.device) -> None:
    """Lets all blocks of a model, and of the teacher that is copied from it, go through compiled functions.

    After the device's patches, before the model has a teacher.

    Raises:
        UsageError: where torch.compile cannot work.
    """
    is_text = getattr(model, "picture_size", None) is None
    run = {
        function: compiled(function, device, dynamic=True)
        for function in (_layer, _layer_rows, _vision, _vision_rows, _multi)
    }
    for block in blocks_of(model):
        if isinstance(block, EncoderLayer):
            forward = functools.partial(text_layer, run)
        elif isinstance(block, Block):
            forward = functools.partial(multi_block, run, is_text)
        else:
            forward = functools.partial(vision_block, run)
        block.forward = functools.partial(_forward, block, forward, block.forward)


def _forward(block: TransformerBlock, run: Callable, eager: Callable, x: Tensor, *others: Any) -> Any:
    """A block's forward pass. What would need graphs of its own stays as it was: the student's evaluations, and a
    batch of one sample or of one token, since torch takes a size of 1 for a constant."""
    is_teacher = not next(block.parameters()).requires_grad
    if not (is_teacher or block.training and torch.is_grad_enabled()) or 1 in x.shape[:2]:
        return eager(x, *others)
    return run(block, *map(_no_view, (x, *others)))


def _no_view(value: Any) -> Any:
    """A view, such as what enters the first block, would have a graph of its own, about the tensor behind it."""
    return value.clone() if isinstance(value, Tensor) and value._is_view() else value


def _mask_of(x: Tensor, key_mask: Tensor | None) -> Tensor:
    """bool [B, T]: batches without padding have one, too, since without it they would have graphs of their own."""
    return torch.ones(x.shape[:2], dtype=torch.bool, device=x.device) if key_mask is None else key_mask


# `forward` of each kind of block, around functions that are compiled: dynamo counts the graphs of each of these


def text_layer(
    run: Compiled, layer: EncoderLayer, x: Tensor, key_mask: Tensor | None, rows: Rows | None = None
) -> Results:
    key_mask = _mask_of(x, key_mask)
    if rows is None:
        return run[_layer](layer, x, key_mask)
    return run[_layer_rows](layer, x, key_mask, rows.flat, rows.slot, rows.width)


def _layer(layer: EncoderLayer, x: Tensor, key_mask: Tensor) -> Results:
    return EncoderLayer.forward(layer, x, key_mask)


def _layer_rows(layer: EncoderLayer, x: Tensor, key_mask: Tensor, flat: Tensor, slot: Tensor, width: int) -> Results:
    return EncoderLayer.forward(layer, x, key_mask, Rows(flat, slot, width))


def vision_block(  # whose class is not named, since its file imports timm, without which text does
    run: Compiled, block: Any, x: Tensor, bias: Tensor | None = None, rows: Tensor | None = None
) -> Results:
    x = x.float()  # under autocast patches are 16-bit, and what a block adds to them is not
    weights = torch.stack(block.branch_weights(x))  # [2, B, 1, 1]
    return run[_vision](block, x, bias, weights) if rows is None else run[_vision_rows](block, x, bias, weights, rows)


def _vision(block: Any, x: Tensor, bias: Tensor | None, weights: Tensor) -> Results:
    return block.compute(x, bias, None, weights[0], weights[1])


def _vision_rows(block: Any, x: Tensor, bias: Tensor | None, weights: Tensor, rows: Tensor) -> Results:
    return block.compute(x, bias, rows, weights[0], weights[1])


def multi_block(run: Compiled, is_text: bool, block: Block, x: Tensor, key_mask: Tensor | None) -> Results:
    key_mask = _mask_of(x, key_mask) if is_text else None
    return run[_multi](block, x, key_mask, torch.stack(block.branch_weights(x)) if block.training else None)


def _multi(block: Block, x: Tensor, key_mask: Tensor | None, weights: Tensor | None) -> Results:
    return block.compute(x, key_mask, *((None, None) if weights is None else (weights[0], weights[1])))
