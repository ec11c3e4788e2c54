"""Dropout, and attention with dropout, that are cheap on a CPU; `cpu_patches` puts them into the models.

torch's CPU dropout spends most of a step on drawing masks, and `scaled_dot_product_attention` with dropout falls back
to a path that writes every intermediate matrix to fresh memory. Here masks come from 16 random bits an element, and
attention works through one head at a time in buffers that stay in the cache. The distribution is that of torch:
independent elements, kept with 1 - p (to within 2^-17, and scaled by exactly the inverse of what is used).
"""

from __future__ import annotations

import math

import numpy as np
import torch

from data2vec.model import attention as plain

_LEVELS = 1 << 16
_CACHED_ELEMENTS = 1 << 18


def _drop_level(p: float) -> int:
    """Of 65536 values of a 16-bit number, how many mean "drop"."""
    return min(max(round(p * _LEVELS), 1), _LEVELS - 1)


def _keep_scale(p: float) -> float:
    return _LEVELS / (_LEVELS - _drop_level(p))


class RandomBits:
    """Draws 16 random bits an element; the stream follows from torch's generator, so seeding torch seeds it."""

    def __init__(self):
        self._bits = np.random.SFC64(int(torch.randint(2**63 - 1, ())))

    def draw(self, shape: tuple[int, ...]) -> torch.Tensor:
        """int16 of `shape`. Kept for the backward pass in place of a mask: half the size of one in fp32."""
        count = math.prod(shape)
        words = self._bits.random_raw(-(-count // 4))  # 64 bits each
        return torch.from_numpy(words.view(np.int16))[:count].view(shape)


def keep_mask(bits: torch.Tensor, p: float, out: torch.Tensor | None = None) -> torch.Tensor:
    """fp32, 1 where the element is kept, with probability 1 - p. As a number: multiplying by a bool is slow."""
    out = bits.float() if out is None else out.copy_(bits)
    return out.ge_(_drop_level(p) - _LEVELS // 2)


class _DropoutAdd(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: torch.Tensor, residual: torch.Tensor | None, p: float) -> torch.Tensor:
        ctx.bits, ctx.p, ctx.dtype = RandomBits().draw(tuple(x.shape)), p, x.dtype
        y = keep_mask(ctx.bits, p).mul_(x)
        if residual is None:
            return y.mul_(_keep_scale(p)).to(x.dtype)
        return torch.add(residual, y.to(x.dtype), alpha=_keep_scale(p))

    @staticmethod
    def backward(ctx, gradient: torch.Tensor):
        own = keep_mask(ctx.bits, ctx.p).mul_(gradient).mul_(_keep_scale(ctx.p))
        return own.to(ctx.dtype), gradient if ctx.needs_input_grad[1] else None, None


def dropout_add(x: torch.Tensor, residual: torch.Tensor | None, p: float, training: bool) -> torch.Tensor:
    """`model.attention.dropout_add`; in compiled code as it is, since these draws are not torch's."""
    if not training or p in (0, 1) or torch.compiler.is_compiling():
        return plain.dropout_add(x, residual, p, training)
    return _DropoutAdd.apply(x, residual, p)


class _DropoutAttention(torch.autograd.Function):
    """A few heads at a time, so that their matrices stay in the cache; the backward pass computes the weights again.

    q, k, v: [N, Q or T, D], N rows times heads. bias: fp32 [N, 1, T] or None.
    """

    @staticmethod
    def forward(ctx, q, k, v, bias, p: float) -> torch.Tensor:
        ctx.dtype, ctx.p = q.dtype, p
        q, k, v = (x.float().contiguous() for x in (q * q.shape[-1] ** -0.5, k, v * _keep_scale(p)))
        bits = RandomBits().draw((q.shape[0], q.shape[1], k.shape[1]))
        out = torch.empty_like(q)
        for heads, (weights, keep) in _groups(bits.shape, buffers=2):
            _softmax_weights(q[heads], k[heads], None if bias is None else bias[heads], weights)
            torch.bmm(weights.mul_(keep_mask(bits[heads], p, keep)), v[heads], out=out[heads])
        ctx.save_for_backward(q, k, v, bias, bits)
        return out.to(ctx.dtype)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor):
        q, k, v, bias, bits = ctx.saved_tensors
        gradient = gradient.float().contiguous()
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        for heads, (weights, keep, slope, product) in _groups(bits.shape, buffers=4):
            _softmax_weights(q[heads], k[heads], None if bias is None else bias[heads], weights)
            keep_mask(bits[heads], ctx.p, keep)
            torch.mul(weights, keep, out=product)
            torch.bmm(product.transpose(1, 2), gradient[heads], out=dv[heads])
            torch.bmm(gradient[heads], v[heads].transpose(1, 2), out=slope)
            torch._softmax_backward_data(slope.mul_(keep), weights, -1, torch.float32, grad_input=product)
            torch.bmm(product, k[heads], out=dq[heads])
            torch.bmm(product.transpose(1, 2), q[heads], out=dk[heads])
        dq.mul_(q.shape[-1] ** -0.5)
        dv.mul_(_keep_scale(ctx.p))
        return dq.to(ctx.dtype), dk.to(ctx.dtype), dv.to(ctx.dtype), None, None


def _groups(shape: torch.Size, buffers: int):
    """(slice of heads, that many [heads, Q, T] buffers) over all heads; about a megabyte each."""
    count, queries, keys = shape
    size = min(count, max(1, _CACHED_ELEMENTS // (queries * keys)))
    memory = [torch.empty(size, queries, keys) for _ in range(buffers)]
    for start in range(0, count, size):
        stop = min(start + size, count)
        yield slice(start, stop), [buffer[: stop - start] for buffer in memory]


def _softmax_weights(q: torch.Tensor, k: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor) -> None:
    """softmax(q k^T + bias), into `out` [heads, Q, T]."""
    torch.bmm(q, k.transpose(1, 2), out=out)
    if bias is not None:
        out += bias
    torch.softmax(out, dim=-1, out=out)


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    key_mask: torch.Tensor | None,
    p: float,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """`model.attention.attention`; without dropout, with a bias, or in compiled code, torch's kernel does it."""
    if p in (0, 1) or bias is not None or torch.compiler.is_compiling():
        return plain.attention(q, k, v, key_mask, p, bias)
    added = None
    if key_mask is not None:
        added = torch.zeros(key_mask.shape).masked_fill_(~key_mask, float("-inf"))
        added = added.repeat_interleave(q.shape[1], dim=0).unsqueeze(1)  # [B * H, 1, T]
    y = _DropoutAttention.apply(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), added, p)
    return y.view(q.shape)
