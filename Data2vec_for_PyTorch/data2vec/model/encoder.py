"""The RoBERTa-style post-LN encoder of data2vec text (fairseq TransformerEncoder with learned positions).

Parameter names and their order are fairseq's: checkpoints and optimizer states are exchanged by them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from data2vec.model.attention import attention, dropout_add
from data2vec.model.transformer_block import TransformerBlock


@dataclass(frozen=True)
class EncoderConfig:
    """Sizes and dropout rates, named as in fairseq's `model.transformer`."""

    vocab_size: int
    embed_dim: int = 768
    ffn_embed_dim: int = 3072
    layers: int = 12
    attention_heads: int = 12
    max_source_positions: int = 512
    dropout: float = 0.1
    attention_dropout: float = 0.1
    activation_dropout: float = 0.0
    layernorm_embedding: bool = True
    no_scale_embedding: bool = True
    checkpoint_activations: bool = False  # the student's layers run again in the backward pass: less memory, more time
    pad_index: int = 1


@dataclass
class Rows:
    """Some rows of a [B, T] batch, and where they stand in a padded [B, width] matrix of them.

    Indices are made on the host (or once a batch), so that no layer needs a boolean index and its device sync.
    """

    flat: torch.Tensor  # [N] row * T + position
    slot: torch.Tensor  # [N] row * width + rank within the row
    width: int


class SelfAttention(nn.Module):
    attend = staticmethod(attention)  # npu_patches and cpu_patches have others

    def __init__(self, config: EncoderConfig):
        super().__init__()
        dim = config.embed_dim
        self.heads = config.attention_heads
        self.dropout = config.attention_dropout
        self.k_proj = nn.Linear(dim, dim)
        self.v_proj = nn.Linear(dim, dim)
        self.q_proj = nn.Linear(dim, dim)
        self.out_proj = nn.Linear(dim, dim)

    def forward(self, x: torch.Tensor, key_mask: torch.Tensor | None, rows: Rows | None = None) -> torch.Tensor:
        """Attention of all tokens [B, T, C], or with `rows` of those only [N, C], to all tokens of x [B, T, C]."""
        batch, _, dim = x.shape
        k = self._split_heads(self.k_proj(x))  # [B, H, T, D]
        v = self._split_heads(self.v_proj(x))
        if rows is None:
            q = self._split_heads(self.q_proj(x))
        else:
            q_rows = self.q_proj(x.flatten(0, 1).index_select(0, rows.flat))  # [N, C]
            q = q_rows.new_zeros(batch * rows.width, dim).index_copy(0, rows.slot, q_rows)
            q = self._split_heads(q.view(batch, rows.width, dim))  # [B, H, width, D]
        p = self.dropout if self.training else 0.0
        y = self.attend(q, k, v, key_mask, p).transpose(1, 2).reshape(batch, -1, dim)  # [B, T or width, C]
        if rows is not None:
            y = y.flatten(0, 1).index_select(0, rows.slot)  # [N, C]
        return self.out_proj(y)

    def _split_heads(self, x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(2, (self.heads, -1)).transpose(1, 2)  # [B, T, C] -> [B, H, T, D]


class EncoderLayer(TransformerBlock):
    dropout_add = staticmethod(dropout_add)  # cpu_patches has another one

    def __init__(self, config: EncoderConfig):
        super().__init__()
        self.checkpoint_activations = config.checkpoint_activations
        self.dropout = config.dropout
        self.activation_dropout = config.activation_dropout
        self.self_attn = SelfAttention(config)
        self.self_attn_layer_norm = nn.LayerNorm(config.embed_dim)
        self.activation = nn.GELU()  # computes in fp32 inside also for 16-bit inputs, as fairseq's gelu
        self.fc1 = nn.Linear(config.embed_dim, config.ffn_embed_dim)
        self.fc2 = nn.Linear(config.ffn_embed_dim, config.embed_dim)
        self.final_layer_norm = nn.LayerNorm(config.embed_dim)

    def forward(
        self, x: torch.Tensor, key_mask: torch.Tensor | None, rows: Rows | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns (x, fc_result): the latter is fc2's output before dropout, residual and LN, data2vec's target.

        With `rows`, both are [N, C], of those rows only; else [B, T, C].
        """
        y = self.self_attn(x, key_mask, rows)
        if rows is not None:
            x = x.flatten(0, 1).index_select(0, rows.flat)  # [N, C]
        x = self.self_attn_layer_norm(self.dropout_add(y, x, self.dropout, self.training))
        y = self.activation(self.fc1(x))
        if self.training and self.activation_dropout > 0:
            y = F.dropout(y, self.activation_dropout)
        result = self.fc2(y)
        return self.final_layer_norm(self.dropout_add(result, x, self.dropout, self.training)), result


class TokenEmbedding(nn.Module):
    """Tokens and learned positions, added and normalised."""

    dropout_add = staticmethod(dropout_add)  # cpu_patches has another one

    def __init__(self, config: EncoderConfig):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.embed_dim, padding_idx=config.pad_index)
        positions = config.max_source_positions + config.pad_index + 1
        self.embed_positions = nn.Embedding(positions, config.embed_dim, padding_idx=config.pad_index)
        if config.layernorm_embedding:
            self.layernorm_embedding = nn.LayerNorm(config.embed_dim)

    def embed(self, tokens: torch.Tensor, has_padding: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(x [B, T, C], key_mask [B, T], True where attention may look, or None where no row is padded)."""
        config = self.config
        x = self.embed_tokens(tokens)
        if not config.no_scale_embedding:
            x = x * config.embed_dim**0.5
        if not has_padding:
            first = config.pad_index + 1
            x = x + self.embed_positions.weight[first : first + tokens.shape[1]]
        else:
            real = tokens.ne(config.pad_index)
            # positions count real tokens only: the first is pad + 1, whatever its place in the row
            positions = real.cumsum(dim=1) * real + config.pad_index
            x = x + self.embed_positions(positions)
        if config.layernorm_embedding:
            x = self.layernorm_embedding(x)
        x = self.dropout_add(x, None, config.dropout, self.training)
        if not has_padding:
            return x, None
        # A row without any token would make its attention NaN; its result is never used, its first key may be seen.
        first_key = torch.zeros_like(real)
        first_key[:, 0] = True
        return x * real.unsqueeze(-1), real | (first_key & ~real.any(dim=1, keepdim=True))


class SentenceEncoder(TokenEmbedding):
    """Embeddings and layers; `version` is fairseq's marker and travels in checkpoints."""

    def __init__(self, config: EncoderConfig):
        super().__init__(config)
        self.register_buffer("version", torch.tensor([3.0]))
        self.layers = nn.ModuleList(EncoderLayer(config) for _ in range(config.layers))

    def forward(self, tokens: torch.Tensor, has_padding: bool = True, rows: Rows | None = None) -> torch.Tensor:
        """Final hidden states: [B, T, C], or [N, C] of `rows` only (the last layer then works on those alone)."""
        x, key_mask = self.embed(tokens, has_padding)
        for layer in self.layers[:-1]:
            x, _ = layer.run(x, key_mask)  # [B, T, C]
        return self.layers[-1].run(x, key_mask, rows)[0]


def init_bert_weights(module: nn.Module, std: float = 0.02) -> None:
    """N(0, std) for linear and embedding weights, 0 for biases and the pad row (fairseq init_bert_params: 0.02)."""
    if isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=std)
        nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Embedding):
        nn.init.normal_(module.weight, std=std)
        with torch.no_grad():
            module.weight[module.padding_idx].zero_()
