"""The transformer block of BEiT v2: attention with relative position bias, layer scale, and work on needed rows only.

Parameter names and their order are the reference's (`modeling_finetune.py`), so its checkpoints load as they are.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from timm.layers import Mlp, drop_path, trunc_normal_
from timm.models.beit import gen_relative_position_index
from torch import Tensor, nn

from common.model import fp8

NORM_EPS = 1e-6


def take_rows(x: Tensor, rows: Tensor) -> Tensor:
    """The given rows of each sample: x [B, N, ...], rows int64 [B, K] -> [B, K, ...].

    One `index_select` over all samples: its shape does not depend on values, and its backward is an `index_add`.
    """
    batch, length = x.shape[:2]
    offsets = torch.arange(batch, device=rows.device).unsqueeze(1) * length  # [B, 1]
    return x.flatten(0, 1).index_select(0, (rows + offsets).flatten()).unflatten(0, rows.shape)


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float, dropout: float = 0.0) -> Tensor:
    """softmax(q k^T * scale + bias) v for q [B, H, K, d], k and v [B, H, N, d], bias broadcastable to [B, H, K, N]."""
    if bias is not None:
        bias = bias.to(q.dtype).expand(q.shape[0], -1, -1, -1)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=dropout, scale=scale)


def attend_plainly(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float, dropout: float = 0.0) -> Tensor:
    """`attend`; under a bias that is trained written out, for devices whose fused kernel has no gradient for one."""
    if bias is None or not (bias.requires_grad and torch.is_grad_enabled()):
        return attend(q, k, v, bias, scale, dropout)
    weights = (q * scale) @ k.transpose(-2, -1) + bias  # [B, H, K, N]
    return F.dropout(weights.softmax(dim=-1), dropout) @ v


def add_branch(
    residual: Tensor, branch: Callable[..., Tensor], inputs: tuple[Tensor | None, ...], drop_prob: float, training: bool
) -> Tensor:
    """residual + drop_path(branch(*inputs)): stochastic depth per sample (Huang et al. 2016).

    Args:
        residual: [B, K, C].
        branch: maps inputs of S samples to [S, K, C].
        inputs: tensors with samples on dim 0, or None; apart from `branch`, so that it can be called on some samples.
    """
    return residual + drop_path(branch(*inputs), drop_prob, training)


class RelativePositionBias(nn.Module):
    """One bias table for all blocks: table [(2H-1)(2W-1)+3, heads] -> bias [1, heads, HW+1, HW+1].

    The three last rows are CLS-to-token, token-to-CLS and CLS-to-CLS. The index is saved, as the reference does.
    """

    def __init__(self, window_size: tuple[int, int], num_heads: int):
        super().__init__()
        self.window_size = window_size
        distances = (2 * window_size[0] - 1) * (2 * window_size[1] - 1) + 3
        self.relative_position_bias_table = nn.Parameter(torch.zeros(distances, num_heads))
        self.register_buffer("relative_position_index", gen_relative_position_index(window_size))

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.relative_position_bias_table)
        self.relative_position_index.copy_(gen_relative_position_index(self.window_size))

    def forward(self) -> Tensor:
        return bias_from_table(self.relative_position_bias_table, self.relative_position_index)


def bias_from_table(table: Tensor, index: Tensor) -> Tensor:
    """table [distances, H], index int64 [N, N] -> [1, H, N, N]."""
    bias = table.index_select(0, index.flatten()).unflatten(0, index.shape)  # [N, N, H]
    return bias.permute(2, 0, 1).contiguous().unsqueeze(0)


class Attention(nn.Module):
    """Multi-head self-attention with a bias on q and v but not on k, and an optional table of its own."""

    attend = staticmethod(attend)  # of this module, so that a device's patches can put theirs in its place
    linear = staticmethod(F.linear)  # likewise, for --fp8

    def __init__(
        self,
        dim: int,
        num_heads: int,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        window_size: tuple[int, int] | None = None,
        attn_head_dim: int | None = None,
    ):
        super().__init__()
        self.num_heads = num_heads
        self.head_dim = attn_head_dim or dim // num_heads
        self.scale = qk_scale or self.head_dim**-0.5
        inner = self.head_dim * num_heads
        self.q_bias = nn.Parameter(torch.zeros(inner)) if qkv_bias else None
        self.v_bias = nn.Parameter(torch.zeros(inner)) if qkv_bias else None
        self.relative_position_bias_table = None
        if window_size is not None:
            distances = (2 * window_size[0] - 1) * (2 * window_size[1] - 1) + 3
            self.relative_position_bias_table = nn.Parameter(torch.zeros(distances, num_heads))
            self.register_buffer("relative_position_index", gen_relative_position_index(window_size))
        self.window_size = window_size
        self.qkv = nn.Linear(dim, 3 * inner, bias=False)
        self.attn_drop = attn_drop
        self.proj = nn.Linear(inner, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def reset_parameters(self) -> None:
        """What is its own: zero biases and table."""
        for parameter in (self.q_bias, self.v_bias, self.relative_position_bias_table):
            if parameter is not None:
                nn.init.zeros_(parameter)
        if self.relative_position_bias_table is not None:
            self.relative_position_index.copy_(gen_relative_position_index(self.window_size))

    def forward(self, x: Tensor, rows: Tensor | None = None, shared_bias: Tensor | None = None) -> Tensor:
        """x [B, N, C], rows int64 [B, K] whose output is needed (None = all), shared_bias [1, H, N, N] -> [B, K, C]."""
        bias = shared_bias
        if self.relative_position_bias_table is not None:
            own = bias_from_table(self.relative_position_bias_table, self.relative_position_index)
            bias = own if bias is None else own + bias
        if rows is not None and bias is not None:
            bias = bias[0].index_select(1, rows.flatten()).unflatten(1, rows.shape).transpose(0, 1)  # [B, H, K, N]
        q, k, v = (t.transpose(1, 2) for t in self._project(x, rows))  # [B, H, K or N, d]
        out = self.attend(q, k, v, bias, self.scale, self.attn_drop if self.training else 0.0)  # [B, H, K, d]
        return self.proj_drop(self.proj(out.transpose(1, 2).flatten(2)))  # [B, K, C]

    def _project(self, x: Tensor, rows: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """q [B, K, H, d], k and v [B, N, H, d]."""
        heads = (self.num_heads, self.head_dim)
        k_bias = None if self.v_bias is None else torch.zeros_like(self.v_bias, requires_grad=False)
        if rows is None:
            qkv_bias = None if k_bias is None else torch.cat((self.q_bias, k_bias, self.v_bias))
            return self.linear(x, self.qkv.weight, qkv_bias).unflatten(-1, (3, *heads)).unbind(2)
        inner = self.num_heads * self.head_dim
        q_weight, kv_weight = self.qkv.weight.split((inner, 2 * inner))
        kv_bias = None if k_bias is None else torch.cat((k_bias, self.v_bias))
        q = self.linear(take_rows(x, rows), q_weight, self.q_bias).unflatten(-1, heads)
        k, v = self.linear(x, kv_weight, kv_bias).unflatten(-1, (2, *heads)).unbind(2)
        return q, k, v


class Block(nn.Module):
    """Pre-norm transformer block with layer scale and stochastic depth.

    x += drop_path(gamma_1 * attn(norm1(x))); x += drop_path(gamma_2 * mlp(norm2(x))). No gammas when init_values is 0.
    """

    add_branch = staticmethod(add_branch)  # likewise

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        drop: float = 0.0,
        attn_drop: float = 0.0,
        drop_path: float = 0.0,
        init_values: float | None = None,
        window_size: tuple[int, int] | None = None,
        attn_head_dim: int | None = None,
        norm_eps: float = NORM_EPS,
    ):
        super().__init__()
        self.gamma_1 = nn.Parameter(torch.full((dim,), float(init_values))) if init_values else None
        self.gamma_2 = nn.Parameter(torch.full((dim,), float(init_values))) if init_values else None
        self.init_values = init_values
        self.norm1 = nn.LayerNorm(dim, eps=norm_eps)
        self.attn = Attention(dim, num_heads, qkv_bias, qk_scale, attn_drop, drop, window_size, attn_head_dim)
        self.drop_prob = float(drop_path)
        self.norm2 = nn.LayerNorm(dim, eps=norm_eps)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop=(0.0, drop))  # no dropout after the activation

    def reset_parameters(self) -> None:
        """What is its own: the layer scale."""
        for gamma in (self.gamma_1, self.gamma_2):
            if gamma is not None:
                nn.init.constant_(gamma, float(self.init_values))

    def forward(self, x: Tensor, shared_bias: Tensor | None = None, rows: Tensor | None = None) -> Tensor:
        """x [B, N, C], shared_bias [1, H, N, N] -> [B, N, C]; with rows int64 [B, K] only those: [B, K, C]."""
        out = x if rows is None else take_rows(x, rows)
        out = self.add_branch(
            out, lambda y, y_rows: self._attention(y, y_rows, shared_bias), (x, rows), self.drop_prob, self.training
        )
        return self.add_branch(out, self._mlp, (out,), self.drop_prob, self.training)

    def _attention(self, x: Tensor, rows: Tensor | None, shared_bias: Tensor | None) -> Tensor:
        y = self.attn(self.norm1(x), rows, shared_bias)
        return y if self.gamma_1 is None else self.gamma_1 * y

    def _mlp(self, x: Tensor) -> Tensor:
        y = self.mlp(self.norm2(x))
        return y if self.gamma_2 is None else self.gamma_2 * y


def use_fp8_in_blocks(model: nn.Module, device: torch.device, precision: str) -> None:
    """--fp8: all blocks of a model, in place; UsageError where it cannot work (common/model/fp8.py)."""
    blocks = [module for module in model.modules() if isinstance(module, Block)]
    fp8.use_fp8(device, precision, "--fp8", blocks)
    for block in blocks:
        block.attn.linear = fp8.linear


def drop_path_rates(drop_path_rate: float, count: int) -> list[float]:
    """Stochastic depth rates rising linearly from 0 to `drop_path_rate`."""
    return torch.linspace(0, drop_path_rate, count, device="cpu").tolist()


def init_linear_and_norm(module: nn.Module, std: float, bound: float, convolutions: bool) -> None:
    """Truncated normal weights with that std cut at +-bound, zero biases, LayerNorm 1 and 0.

    The reference pretrains with bound = std (a real std of about 0.54 std) and fine-tunes with bound = 2. Its
    fine-tuning form leaves convolutions at torch's default.
    """
    if isinstance(module, nn.Linear) or (convolutions and isinstance(module, nn.Conv2d)):
        trunc_normal_(module.weight, std=std, a=-bound, b=bound)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.LayerNorm):
        nn.init.ones_(module.weight)
        nn.init.zeros_(module.bias)
