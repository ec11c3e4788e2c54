"""The transformer block of data2vec 2.0, for all modalities (fairseq AltBlock); post-norm as BERT, or pre-norm."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data2vec.model.attention import attention, dropout_add
from data2vec.model.transformer_block import TransformerBlock


@dataclass(frozen=True)
class BlockConfig:
    """Sizes and dropout rates, named as in fairseq's Data2VecMultiConfig; the last one is ours."""

    embed_dim: int = 768
    num_heads: int = 12
    mlp_ratio: float = 4
    encoder_dropout: float = 0.1  # of the attention's output
    attention_dropout: float = 0.1
    activation_dropout: float = 0.0
    post_mlp_drop: float = 0.1
    norm_eps: float = 1e-6
    norm_affine: bool = True
    layer_norm_first: bool = False
    end_of_block_targets: bool = False
    checkpoint_activations: bool = False

    def norm(self) -> nn.LayerNorm:
        return nn.LayerNorm(self.embed_dim, self.norm_eps, self.norm_affine)


class Attention(nn.Module):
    """Self-attention with one product for queries, keys and values."""

    attend = staticmethod(attention)  # npu_patches and cpu_patches have others

    def __init__(self, config: BlockConfig):
        super().__init__()
        self.heads, self.dropout = config.num_heads, config.attention_dropout
        self.qkv = nn.Linear(config.embed_dim, 3 * config.embed_dim)
        self.proj = nn.Linear(config.embed_dim, config.embed_dim)

    def forward(self, x: Tensor, key_mask: Tensor | None) -> Tensor:
        """x [B, T, C]; key_mask bool [B, T], True where keys may be seen, or None where all may."""
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # 3 x [B, H, T, D]
        y = self.attend(q, k, v, key_mask, self.dropout if self.training else 0.0)  # [B, H, T, D]
        return self.proj(y.transpose(1, 2).flatten(2))  # [B, T, C]


class Block(TransformerBlock):
    """Attention and feed-forward; the teacher's target is the latter's output, or the block's."""

    dropout_add = staticmethod(dropout_add)  # cpu_patches has another one

    def __init__(self, config: BlockConfig, drop_path: float = 0.0):
        super().__init__()
        self.config, self.drop_path = config, drop_path
        self.checkpoint_activations = config.checkpoint_activations
        inner = int(config.embed_dim * config.mlp_ratio)
        self.norm1 = config.norm()
        self.attn = Attention(config)
        self.norm2 = config.norm()
        self.activation = nn.GELU()
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(config.embed_dim, inner), "fc2": nn.Linear(inner, config.embed_dim)})

    def forward(self, x: Tensor, key_mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """(x, target), [B, T, C] each."""
        has_drop_path = self.training and self.drop_path > 0
        return self.compute(x, key_mask, *(self.branch_weights(x) if has_drop_path else (None, None)))

    def branch_weights(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """What attention and feed-forward count for every sample: 0, or 1 / (1 - rate). [B, 1, 1] each."""
        ones = x.new_ones(len(x), 1, 1)
        return F.dropout(ones, self.drop_path, self.training), F.dropout(ones, self.drop_path, self.training)

    def compute(
        self, x: Tensor, key_mask: Tensor | None, attention: Tensor | None, feed_forward: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """`forward` with the weights of its branches given; None for 1."""
        config = self.config
        if config.layer_norm_first:
            x = self._add(self.attn(self.norm1(x), key_mask), x, config.encoder_dropout, attention)
            result = self._feed_forward(self.norm2(x))
            # the reference adds the feed-forward branch to itself here, not to x; released models have norm2 last
            x = self._add(result, result, config.post_mlp_drop, feed_forward)
        else:
            x = self.norm1(self._add(self.attn(x, key_mask), x, config.encoder_dropout, attention))
            result = self._feed_forward(x)
            x = self.norm2(self._add(result, x, config.post_mlp_drop, feed_forward))
        return x, x if config.end_of_block_targets else result

    def _feed_forward(self, x: Tensor) -> Tensor:
        p = self.config.activation_dropout
        y = self.dropout_add(self.activation(self.mlp["fc1"](x)), None, p, self.training)  # [B, T, 4 C]
        return self.dropout_add(self.mlp["fc2"](y), None, p, self.training)  # [B, T, C]

    def _add(self, y: Tensor, residual: Tensor, p: float, weight: Tensor | None) -> Tensor:
        """residual + y with dropout, and with stochastic depth whole samples left out."""
        if weight is None:
            return self.dropout_add(y, residual, p, self.training)
        return residual + weight * self.dropout_add(y, None, p, self.training)


def stack(config: BlockConfig, depth: int, first_rate: float, last_rate: float) -> nn.ModuleList:
    """Blocks whose stochastic depth goes evenly from the first rate to the last."""
    rates = torch.linspace(first_rate, last_rate, depth, device="cpu").tolist()
    return nn.ModuleList(Block(config, rate) for rate in rates)
