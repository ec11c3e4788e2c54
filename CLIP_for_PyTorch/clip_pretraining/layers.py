"""Encoder layers that compute what the features need and no more, put into a model of `transformers` by `install`.

Features and gradients stay what they were, and so do the names of all parameters:

- Both towers pool the first token. Their last layer needs keys and values of all tokens, and everything else (queries,
  output projection, MLP) of the first one only.
- On a CPU RoBERTa works on the tokens of a batch without the padding between them; quick_gelu is two passes over its
  input instead of seven; the patches are projected by a matrix product, whose backward is quicker than a convolution's;
  bf16 runs at the fp32 rate where there are no bf16 instructions (common/cpu_kernels.py).
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import CLIPTextModel, CLIPVisionModel, PreTrainedModel, RobertaModel
from transformers.activations import QuickGELUActivation
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions

from common.cpu import cpu_kernels


def install(model: PreTrainedModel, device: torch.device) -> PreTrainedModel:
    """Replaces the layers of the towers that are known here (CLIP's, RoBERTa); any other tower stays as it is.

    The model's `last_hidden_state` is then that of the first token alone, [B, 1, C], for the vision tower and RoBERTa.
    """
    on_cpu = device.type == "cpu"
    for tower in (model.vision_model, model.text_model):
        if isinstance(tower, CLIPVisionModel | CLIPTextModel):
            layers = tower.encoder.layers
            pooled = len(layers) - 1 if isinstance(tower, CLIPVisionModel) else None
            for index, layer in enumerate(layers):
                layers[index] = ClipLayer(layer, first_token_only=index == pooled)
        elif type(tower) is RobertaModel and not tower.config.is_decoder:
            tower.encoder = RobertaEncoder(tower.encoder, pack=on_cpu)
        if on_cpu and isinstance(tower, CLIPVisionModel):
            tower.embeddings.patch_embedding = PatchProjection(tower.embeddings.patch_embedding)
    if on_cpu:
        for module in model.modules():
            if isinstance(getattr(module, "activation_fn", None), QuickGELUActivation):
                module.activation_fn = QuickGelu()
    return model


class _Layer(GradientCheckpointingLayer):
    """Takes over the parts of a layer of `transformers`, and with them the names of its parameters."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        for name, part in layer.named_children():
            self.add_module(name, part)
        self.training = layer.training


class ClipLayer(_Layer):
    """`CLIPEncoderLayer`: pre-norm attention and MLP. With `first_token_only` [B, N, C] -> [B, 1, C]."""

    def __init__(self, layer: nn.Module, first_token_only: bool):
        super().__init__(layer)
        self.first_token_only = first_token_only

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, is_causal: bool = False, **kwargs: Any
    ) -> Tensor:
        with _kernels(hidden_states):
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


@dataclass(frozen=True)
class Packing:
    """Where the tokens of padded captions [B, L] are when the padding is left out: T rows instead of B * L."""

    batch: int
    length: int
    rows: Tensor  # int64 [T], the position of each token in the flattened [B * L]
    first: Tensor  # int64 [B], the row of each caption's first token

    @classmethod
    def of(cls, mask: Tensor) -> Packing:
        """mask: bool [B, L], True for tokens; captions begin at position 0."""
        lengths = mask.sum(1)  # [B]
        return cls(*mask.shape, mask.flatten().nonzero().squeeze(1), lengths.cumsum(0) - lengths)

    def pack(self, x: Tensor) -> Tensor:
        """[B, L, C] -> [T, C]"""
        return x.flatten(0, 1).index_select(0, self.rows)

    def pad(self, x: Tensor) -> Tensor:
        """[T, C] -> [B, L, C], zeros in between"""
        padded = x.new_zeros(self.batch * self.length, x.shape[1]).index_copy(0, self.rows, x)  # [B * L, C]
        return padded.unflatten(0, (self.batch, self.length))


class RobertaEncoder(nn.Module):
    """`RobertaEncoder` of `transformers` for the pooled feature: [B, L, C] -> [B, 1, C].

    pack: leave the padding out between attentions. The number of rows then differs from batch to batch, which suits a
        CPU and no device that compiles a graph for each shape.
    """

    def __init__(self, encoder: nn.Module, pack: bool):
        super().__init__()
        self.pack = pack
        last = len(encoder.layer) - 1
        self.layer = nn.ModuleList(RobertaLayer(layer, index == last) for index, layer in enumerate(encoder.layer))

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any):
        x, packing = hidden_states, None
        if attention_mask is not None:
            attention_mask = attention_mask[:, :, :1]  # [B, 1, 1, L]; the rows are alike
            if self.pack and attention_mask.dtype == torch.bool and not torch.compiler.is_compiling():
                packing = Packing.of(attention_mask[:, 0, 0])
                x = packing.pack(x)
        for layer in self.layer:
            x = layer(x, attention_mask, packing)
        return BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=x)


class RobertaLayer(_Layer):
    """`RobertaLayer`: post-norm attention and MLP, on [B, L, C] or packed [T, C]. `first_token_only`: -> [B, 1, C]."""

    def __init__(self, layer: nn.Module, first_token_only: bool):
        super().__init__(layer)
        self.first_token_only = first_token_only

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None, packing: Packing | None) -> Tensor:
        with _kernels(hidden_states):
            x = rows = hidden_states
            if self.first_token_only:
                rows = x[:, :1] if packing is None else x[packing.first].unsqueeze(1)  # [B, 1, C]
            rows = self.attention.output(self._attention(rows, x, attention_mask, packing), rows)
            return self.output(self.intermediate(rows), rows)

    def _attention(self, queries: Tensor, x: Tensor, mask: Tensor | None, packing: Packing | None) -> Tensor:
        attention = self.attention.self

        def heads(rows: Tensor) -> Tensor:
            rows = rows if rows.dim() == 3 else packing.pad(rows)
            return rows.unflatten(-1, (attention.num_attention_heads, -1)).transpose(1, 2)  # [B, H, Q or L, D]

        y = F.scaled_dot_product_attention(
            heads(attention.query(queries)),
            heads(attention.key(x)),
            heads(attention.value(x)),
            attn_mask=mask,
            dropout_p=attention.dropout.p if self.training else 0.0,
        )
        y = y.transpose(1, 2).flatten(2)  # [B, Q, C]
        return y if queries.dim() == 3 else packing.pack(y)


class QuickGelu(nn.Module):
    """x * sigmoid(1.702 x), as `transformers.activations.QuickGELUActivation`."""

    def forward(self, x: Tensor) -> Tensor:
        return _QuickGelu.apply(x)


class _QuickGelu(torch.autograd.Function):
    """silu(1.702 x) / 1.702, whose derivative is that of silu at 1.702 x: torch has a kernel for it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        scaled = 1.702 * x
        ctx.save_for_backward(scaled)
        return F.silu(scaled).div_(1.702)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return torch.ops.aten.silu_backward(gradient, *ctx.saved_tensors)


class PatchProjection(nn.Module):
    """A convolution whose stride is its kernel, as a matrix product: [B, 3, S, S] -> [B, C, S / P, S / P]."""

    def __init__(self, convolution: nn.Conv2d):
        super().__init__()
        self.weight, self.bias = convolution.weight, convolution.bias

    def forward(self, pixels: Tensor) -> Tensor:
        patch = self.weight.shape[-1]
        x = pixels.unfold(2, patch, patch).unfold(3, patch, patch)  # [B, 3, h, w, P, P]
        height, width = x.shape[2:4]
        x = x.permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)  # [B, h * w, 3 * P * P]
        with _kernels(x):
            y = F.linear(x, self.weight.flatten(1), self.bias)  # [B, h * w, C]
        return y.transpose(1, 2).unflatten(2, (height, width))


def _kernels(x: Tensor) -> contextlib.AbstractContextManager:
    """common/cpu_kernels.py where they apply. Inside the layers, since gradient checkpointing runs a layer again."""
    return cpu_kernels() if x.is_cpu and not torch.compiler.is_compiling() else contextlib.nullcontext()
