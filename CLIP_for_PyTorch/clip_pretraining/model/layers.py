"""Encoder layers that compute what the features need and no more, put into a model of `transformers` by `install`.

Both towers pool the first token. Their last layer needs keys and values of all tokens, and everything else (queries,
output projection, MLP) of the first one only. Features and gradients stay what they were, and so do the names of all
parameters. What a device does otherwise is in `clip_pretraining/cpu_patches.py` and `npu_patches.py`.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPVisionModel, PreTrainedModel, RobertaModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions


def install(model: PreTrainedModel) -> PreTrainedModel:
    """Replaces the layers of the towers that are known here (CLIP's, RoBERTa); any other tower stays as it is.

    The model's `last_hidden_state` is then that of the first token alone, [B, 1, C], for the vision tower and RoBERTa.
    """
    for tower in (model.vision_model, model.text_model):
        if isinstance(tower, CLIPVisionModel | CLIPTextModel):
            layers = tower.encoder.layers
            pooled = len(layers) - 1 if isinstance(tower, CLIPVisionModel) else None
            for index, layer in enumerate(layers):
                layers[index] = ClipLayer(layer, first_token_only=index == pooled)
        elif type(tower) is RobertaModel and not tower.config.is_decoder:
            tower.encoder = RobertaEncoder(tower.encoder)
    return model


class _Layer(GradientCheckpointingLayer):
    """Takes over the parts of a layer of `transformers`, and with them the names of its parameters."""

    def __init__(self, layer: nn.Module, first_token_only: bool):
        super().__init__()
        for name, part in layer.named_children():
            self.add_module(name, part)
        self.training = layer.training
        self.first_token_only = first_token_only


class ClipLayer(_Layer):
    """`CLIPEncoderLayer`: pre-norm attention and MLP. With `first_token_only` [B, N, C] -> [B, 1, C]."""

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, is_causal: bool = False, **kwargs: Any
    ) -> Tensor:
        rows = hidden_states[:, :1] if self.first_token_only else hidden_states  # [B, Q, C]
        x = self.layer_norm1(hidden_states)  # [B, N, C]
        rows = rows + self._attention(x[:, : rows.shape[1]], x, attention_mask, is_causal)
        return rows + self.mlp(self.layer_norm2(rows))

    def _attention(self, queries: Tensor, x: Tensor, mask: Tensor | None, is_causal: bool) -> Tensor:
        attention = self.self_attn
        q, k, v = (
            projection(rows).unflatten(-1, (attention.num_heads, -1)).transpose(1, 2)  # [B, H, Q or N, D]
            for projection, rows in ((attention.q_proj, queries), (attention.k_proj, x), (attention.v_proj, x))
        )
        y = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=mask,
            dropout_p=attention.dropout if self.training else 0.0,
            is_causal=is_causal and mask is None,
        )
        return attention.out_proj(y.transpose(1, 2).flatten(2))  # [B, Q, C]


class RobertaEncoder(nn.Module):
    """`RobertaEncoder` of `transformers` for the pooled feature: [B, L, C] -> [B, 1, C]."""

    def __init__(self, encoder: nn.Module):
        super().__init__()
        last = len(encoder.layer) - 1
        self.layer = nn.ModuleList(RobertaLayer(layer, index == last) for index, layer in enumerate(encoder.layer))

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any):
        if attention_mask is not None:
            attention_mask = attention_mask[:, :, :1]  # [B, 1, 1, L]; the rows are alike
        return BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=self.run(hidden_states, attention_mask))

    def run(self, x: Tensor, attention_mask: Tensor | None) -> Tensor:
        for layer in self.layer:
            x = layer(x, attention_mask)  # [B, L, C], of the last layer [B, 1, C]
        return x


class RobertaLayer(_Layer):
    """`RobertaLayer`: post-norm attention and MLP. With `first_token_only` [B, L, C] -> [B, 1, C]."""

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None) -> Tensor:
        rows = hidden_states[:, :1] if self.first_token_only else hidden_states  # [B, Q, C]
        rows = self.attention.output(self._attention(rows, hidden_states, attention_mask), rows)
        return self.output(self.intermediate(rows), rows)

    def _attention(self, queries: Tensor, x: Tensor, mask: Tensor | None) -> Tensor:
        attention = self.attention.self
        q, k, v = (
            projection(rows).unflatten(-1, (attention.num_attention_heads, -1)).transpose(1, 2)  # [B, H, Q or L, D]
            for projection, rows in ((attention.query, queries), (attention.key, x), (attention.value, x))
        )
        dropout = attention.dropout.p if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
        return y.transpose(1, 2).flatten(2)  # [B, Q, C]


def full_attention_mask(mask: Tensor, text_model: nn.Module) -> Tensor:
    """[B, T] of 0 and 1 -> bool [B, 1, T, T], True where a token sees another.

    transformers asks a [B, T] mask whether it hides anything at all, and the host waits for the answer; a mask of full
    size it takes as it is. CLIP's own text model is causal.
    """
    length = mask.shape[1]
    seen = mask.bool()[:, None, None, :].expand(-1, 1, length, -1)  # [B, 1, T, T]
    return seen.tril() if isinstance(text_model, CLIPTextModel) else seen
