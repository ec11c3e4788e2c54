"""Memory of one rank under FSDP2, computed from the model's shapes (`--plan_memory [RANKS]`)."""

from __future__ import annotations

import argparse
from dataclasses import dataclass

from beit2.model.masked_image_model import MaskedImageModel
from common.errors import UsageError

GIB = 1 << 30
_TOKENIZER_PARAMETERS = 86_400_000  # the base encoder and its task layer; the decoder is not loaded


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes of one rank.

    Attributes:
        states: fp32 masters, gradient and AdamW's two moments, sharded.
        gathered: the units that are whole at one time: root, the block at work and the one fetched ahead, and the
            block's gradient before it is reduced.
        activations: what forward keeps for backward, and the work space of one block.
        tokenizer: the frozen encoder.
    """

    states: int
    gathered: int
    activations: int
    tokenizer: int

    @property
    def total(self) -> int:
        return self.states + self.gathered + self.activations + self.tokenizer


def plan(model: MaskedImageModel, ranks: int, batch_size: int, masked: int, recompute: bool, width: int) -> MemoryPlan:
    """The plan of a model (on the meta device) whose compute dtype has `width` bytes."""
    parameters = sum(p.numel() for p in model.parameters())
    blocks = [*model.blocks, *getattr(model, "cls_pt_layers", ())]
    block = max(sum(p.numel() for p in b.parameters()) for b in blocks)
    root = parameters - sum(sum(p.numel() for p in b.parameters()) for b in blocks)
    tokens = model.patch_embed.num_patches + 1
    heads = model.blocks[0].attn.num_heads

    stream = batch_size * tokens * model.embed_dim  # values of one [B, 1 + N, C]
    # norm1, q k v, attention out, proj, norm2, fc1 (4), GELU (4), fc2; two residuals in fp32; the weights of softmax
    inside = (15 * width + 2 * 4) * stream + batch_size * heads * tokens**2 * (4 + 4 + width)
    kept = len(blocks) * (4 * stream if recompute else inside) + (inside if recompute else 0)
    outputs = 2 if model.cls_pt else 1
    logits = outputs * batch_size * masked * model.vocab_size * (width + 4 + 4)  # logits, fp32 copy, gradient
    return MemoryPlan(
        states=-(-parameters // ranks) * (4 + 4 + 8),
        gathered=(root + 2 * block) * width + (root + block) * (width + 4),
        activations=kept + logits,
        tokenizer=_TOKENIZER_PARAMETERS * width,
    )


def plan_memory(model: MaskedImageModel, options: argparse.Namespace, ranks: int) -> str:
    """The table of `--plan_memory`, for a model and the options' batch, with and without recomputed blocks.

    Raises:
        UsageError: no rank.
    """
    if ranks < 1:
        raise UsageError(f"--plan_memory {ranks}: must be at least 1 rank")
    parameters = sum(p.numel() for p in model.parameters())
    width = 4 if options.precision == "fp32" else 2
    lines = [
        f"{options.model}: {parameters:,} parameters, FSDP2 over {ranks} ranks, {options.batch_size} pictures a rank, "
        f"compute in {options.precision or 'bf16'}; GiB a rank:",
        f"{'':28}{'states':>8}{'gathered':>10}{'activations':>13}{'tokenizer':>11}{'total':>8}",
    ]
    for name, recompute in (("--activation_checkpointing", True), ("everything kept", False)):
        p = plan(model, ranks, options.batch_size, options.num_mask_patches, recompute, width)
        lines.append(
            f"{name:28}{p.states / GIB:8.1f}{p.gathered / GIB:10.1f}{p.activations / GIB:13.1f}"
            f"{p.tokenizer / GIB:11.1f}{p.total / GIB:8.1f}"
        )
    return "\n".join(lines)
