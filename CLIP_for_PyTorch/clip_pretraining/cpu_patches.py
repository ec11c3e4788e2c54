"""What the models do otherwise on a CPU, each change a named function with its reason; the results stay the same.

CPU_PATCHES_OFF=NAME,... leaves patches out.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import CLIPVisionModel, PreTrainedModel
from transformers.activations import QuickGELUActivation

from clip_pretraining.model.layers import ClipLayer, RobertaEncoder, RobertaLayer
from common.cpu import cpu_kernels
from common.model.patches import chosen


def pack_captions(model: PreTrainedModel) -> int:
    """RoBERTa works on the tokens of a batch without the padding between them: COCO's captions fill 60 % of a batch.

    The number of rows differs from batch to batch, which suits a CPU and no device that compiles for each shape.
    """
    return _become(model, {RobertaEncoder: PackedRobertaEncoder, RobertaLayer: PackedRobertaLayer})


def use_fp32_kernels(model: PreTrainedModel) -> int:
    """bf16 runs at the fp32 rate where there are no bf16 instructions (common/cpu.py).

    Inside the layers and not around the model, since gradient checkpointing runs a layer again.
    """
    return _become(model, {ClipLayer: CpuClipLayer, RobertaLayer: CpuRobertaLayer, PackedRobertaLayer: CpuPackedLayer})


def use_silu_for_quick_gelu(model: PreTrainedModel) -> int:
    """Two passes over the input of quick_gelu instead of seven: torch has a kernel for silu and its derivative."""
    layers = [m for m in model.modules() if isinstance(getattr(m, "activation_fn", None), QuickGELUActivation)]
    for module in layers:
        module.activation_fn = QuickGelu()
    return len(layers)


def project_patches_by_matrix_product(model: PreTrainedModel) -> int:
    """Patches are projected by a matrix product, whose backward is quicker than that of a convolution."""
    if not isinstance(model.vision_model, CLIPVisionModel):
        return 0
    embeddings = model.vision_model.embeddings
    embeddings.patch_embedding = PatchProjection(embeddings.patch_embedding)
    return 1


PATCHES = {
    "pack_captions": pack_captions,
    "fp32_kernels": use_fp32_kernels,
    "quick_gelu": use_silu_for_quick_gelu,
    "patch_projection": project_patches_by_matrix_product,
}


def apply(model: PreTrainedModel, device: torch.device) -> int:
    """Prepares a model whose layers are installed, and returns how many modules changed; none on npu and cuda.

    Raises:
        UsageError: CPU_PATCHES_OFF names no patch.
    """
    patches = chosen(PATCHES, "CPU_PATCHES_OFF")
    return sum(patch(model) for patch in patches.values()) if device.type == "cpu" else 0


def _become(model: nn.Module, kinds: dict[type[nn.Module], type[nn.Module]]) -> int:
    """Gives modules the class that computes the same another way; parameters and their names stay."""
    found = [module for module in model.modules() if type(module) in kinds]
    for module in found:
        module.__class__ = kinds[type(module)]
    return len(found)


# -- captions without their padding ----------------------------------------------------------------------------------


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


class PackedRobertaEncoder(RobertaEncoder):
    """`RobertaEncoder` on packed tokens, where a mask says which positions are padding."""

    def run(self, x: Tensor, attention_mask: Tensor | None) -> Tensor:
        if attention_mask is None or attention_mask.dtype != torch.bool or torch.compiler.is_compiling():
            return super().run(x, attention_mask)
        packing = Packing.of(attention_mask[:, 0, 0])
        x = packing.pack(x)  # [T, C]
        for layer in self.layer:
            x = layer(x, attention_mask, packing)
        return x


class PackedRobertaLayer(RobertaLayer):
    """`RobertaLayer` on packed tokens [T, C] -> [T, C]; with `first_token_only` -> [B, 1, C]."""

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None, packing: Packing | None = None) -> Tensor:
        if packing is None:
            return super().forward(hidden_states, attention_mask)
        x = rows = hidden_states
        if self.first_token_only:
            rows = x[packing.first].unsqueeze(1)  # [B, 1, C]
        rows = self.attention.output(self._packed_attention(rows, x, attention_mask, packing), rows)
        return self.output(self.intermediate(rows), rows)

    def _packed_attention(self, queries: Tensor, x: Tensor, mask: Tensor, packing: Packing) -> Tensor:
        """Each projection on the tokens alone, the products between tokens with the padding in its place."""
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


# -- kernels ---------------------------------------------------------------------------------------------------------


class _Kernels(nn.Module):
    """A layer that runs with common/cpu.py's kernels."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        with _kernels():
            return super().forward(x, *args, **kwargs)


class CpuClipLayer(_Kernels, ClipLayer):
    """`ClipLayer` with those kernels."""


class CpuRobertaLayer(_Kernels, RobertaLayer):
    """`RobertaLayer` with those kernels."""


class CpuPackedLayer(_Kernels, PackedRobertaLayer):
    """`PackedRobertaLayer` with those kernels."""


class QuickGelu(nn.Module):
    """x * sigmoid(1.702 x), as `transformers.activations.QuickGELUActivation`."""

    def forward(self, x: Tensor) -> Tensor:
        return _QuickGelu.apply(x)


class _QuickGelu(torch.autograd.Function):
    """silu(1.702 x) / 1.702, whose derivative is that of silu at 1.702 x."""

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
        with _kernels():
            y = F.linear(x, self.weight.flatten(1), self.bias)  # [B, h * w, C]
        return y.transpose(1, 2).unflatten(2, (height, width))


def _kernels() -> contextlib.AbstractContextManager:
    return contextlib.nullcontext() if torch.compiler.is_compiling() else cpu_kernels()
