"""Both losses for large batches: the logits exist a few rows at a time, and the backward pass computes them again.

The memory is that of the features and of one tile, linear in the batch; the value and the gradients are those of the
formulas in loss.py. Every rank has the rows of its own images against the texts of all ranks, and one matrix serves
both directions: a text's log-sum-exp over all images is put together from the ranks' parts.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from common import distributed

TILE = 2**21  # logits that exist at a time: 8 MB in fp32, and as much for each of two or three temporaries
_FEWEST_ROWS = 16  # a thinner tile is a slow matrix product


class TiledContrastive(torch.autograd.Function):
    """InfoNCE. The mean of the result over ranks is the loss of the global batch; gradients as loss.py says.

    Args of `apply`: image, text [b, d]; scale, a scalar tensor; ids int64 [b] or None, equal where captions are; scope.
    """

    @staticmethod
    def forward(ctx: Any, image: Tensor, text: Tensor, scale: Tensor, ids: Tensor | None, scope: str) -> Tensor:
        texts, ids_of_all, first = _of_all_ranks(text, ids, scope)
        of_image = image.new_empty(len(image))  # [b], log-sum-exp over texts
        largest, total = image.new_full((len(texts),), -torch.inf), image.new_zeros(len(texts))  # [N] each
        for rows, logits in _tiles(image, texts, scale, ids, ids_of_all, first):
            of_image[rows] = logits.logsumexp(1)
            higher = torch.maximum(largest, logits.amax(0)).clamp_(min=torch.finfo(logits.dtype).min)
            total.mul_((largest - higher).exp_()).add_(logits.sub_(higher).exp_().sum(0))
            largest = higher
        of_text = _over_ranks(largest + total.log(), scope)  # [N], log-sum-exp over the images of all ranks
        own = slice(first, first + len(image))
        positive = scale * (image * text).sum(1)  # [b]
        ctx.save_for_backward(image, texts, scale, of_image, of_text, ids, ids_of_all)
        ctx.first, ctx.scope = first, scope
        return (of_image + of_text[own] - 2 * positive).mean() / 2

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        image, texts, scale, of_image, of_text, ids, ids_of_all = ctx.saved_tensors
        image_grad, text_grad = torch.empty_like(image), torch.zeros_like(texts)
        for rows, logits in _tiles(image, texts, scale, ids, ids_of_all, ctx.first):
            share = (logits - of_image[rows, None]).exp_().add_(logits.sub_(of_text).exp_())  # [r, N]
            _pairs_of(share, rows, ctx.first).sub_(2)
            torch.mm(share, texts, out=image_grad[rows])
            text_grad.addmm_(share.T, image[rows])
        factor = gradient * scale / (2 * len(image))
        return (*_gradients(image, image_grad.mul_(factor), text_grad.mul_(factor), scale, ctx), None, None)


class TiledSigmoid(torch.autograd.Function):
    """SigLIP's loss; args as `TiledContrastive` with the bias, a scalar tensor, after the scale."""

    @staticmethod
    def forward(
        ctx: Any, image: Tensor, text: Tensor, scale: Tensor, bias: Tensor, ids: Tensor | None, scope: str
    ) -> Tensor:
        texts, ids_of_all, first = _of_all_ranks(text, ids, scope)
        total = image.new_zeros(())
        for rows, logits in _tiles(image, texts, scale, ids, ids_of_all, first):
            logits.add_(bias).neg_()  # z (s cos + b) of negatives
            _pairs_of(logits, rows, first).neg_()
            total -= F.logsigmoid(logits).sum()
        ctx.save_for_backward(image, texts, scale, bias, ids, ids_of_all)
        ctx.first, ctx.scope = first, scope
        return total / len(image)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        image, texts, scale, bias, ids, ids_of_all = ctx.saved_tensors
        image_grad, text_grad = torch.empty_like(image), torch.zeros_like(texts)
        bias_grad = image.new_zeros(())
        for rows, logits in _tiles(image, texts, scale, ids, ids_of_all, ctx.first):
            share = logits.add_(bias).sigmoid_()  # [r, N]
            _pairs_of(share, rows, ctx.first).sub_(1)
            bias_grad += share.sum()
            torch.mm(share, texts, out=image_grad[rows])
            text_grad.addmm_(share.T, image[rows])
        factor = gradient * scale / len(image)
        of_image, of_text, of_scale = _gradients(image, image_grad.mul_(factor), text_grad.mul_(factor), scale, ctx)
        return of_image, of_text, of_scale, bias_grad * gradient / len(image), None, None


def hide_equal_captions(logits: Tensor, ids: Tensor, ids_of_all: Tensor, first: int) -> Tensor:
    """logits [r, N] with -inf where a text, though of another pair, is the row's own caption over again.

    ids: int64 [r] of the rows, `ids_of_all`: [N]; row i belongs to column first + i.
    """
    equal = ids[:, None] == ids_of_all[None, :]  # [r, N]
    equal[:, first : first + len(ids)].fill_diagonal_(False)
    return logits.masked_fill_(equal, -torch.inf) if not logits.requires_grad else logits.masked_fill(equal, -torch.inf)


def _of_all_ranks(text: Tensor, ids: Tensor | None, scope: str) -> tuple[Tensor, Tensor | None, int]:
    """Texts [N, d], their captions' ids, and the row that this rank's begin at."""
    if scope == "local" or distributed.world_size() == 1:
        return text, ids, 0
    ids_of_all = None if ids is None else distributed.all_gather_with_grad(ids)
    return distributed.all_gather_with_grad(text.detach()), ids_of_all, distributed.rank() * len(text)


def _over_ranks(part: Tensor, scope: str) -> Tensor:
    """log-sum-exp [N] over the ranks' parts of it."""
    if scope == "local" or distributed.world_size() == 1:
        return part
    return distributed.all_gather_with_grad(part[None]).logsumexp(0)


def _tiles(
    image: Tensor, texts: Tensor, scale: Tensor, ids: Tensor | None, ids_of_all: Tensor | None, first: int
) -> Iterator[tuple[slice, Tensor]]:
    """(rows, their logits [r, N]), which the caller may overwrite."""
    height = max(_FEWEST_ROWS, TILE // len(texts))
    for start in range(0, len(image), height):
        rows = slice(start, min(start + height, len(image)))
        logits = (image[rows] * scale) @ texts.T  # [r, N]
        if ids is not None:
            logits = hide_equal_captions(logits, ids[rows], ids_of_all, first + start)
        yield rows, logits


def _pairs_of(tile: Tensor, rows: slice, first: int) -> Tensor:
    """The entries of a tile that belong to pairs, as a view [r]."""
    return tile[:, first + rows.start : first + rows.stop].diagonal()


def _gradients(
    image: Tensor, image_grad: Tensor, text_grad: Tensor, scale: Tensor, ctx: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Of this rank's images and texts, and of the scale: a logit's derivative by it is the logit over the scale."""
    of_scale = (image_grad * image).sum() / scale
    if len(text_grad) > len(image):
        text_grad = distributed.all_reduce_sum(text_grad)[ctx.first : ctx.first + len(image)]
    return image_grad, text_grad, of_scale
