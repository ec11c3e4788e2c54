"""What BEiT v2 does otherwise on a CPU, each change a named function with its reason; the models know nothing of it.

CPU_PATCHES_OFF=NAME,... leaves patches out. The results are the same up to rounding.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from beit2.model.blocks import Attention, Block, attend_plainly
from beit2.model.encoder import Encoder
from common.cpu import use_cpu_kernels
from common.model.patches import chosen


def use_plain_attention(model: nn.Module) -> None:
    """Attention with a trained bias as plain products: no fused CPU kernel has that gradient, and this is faster."""
    for module in model.modules():
        if isinstance(module, Attention):
            module.attend = attend_plainly


def skip_dropped_samples(model: nn.Module) -> None:
    """Branches are computed for the samples that stochastic depth keeps. Elsewhere shapes that change cost more."""
    for module in model.modules():
        if isinstance(module, Block):
            module.add_branch = add_kept_samples


def add_kept_samples(
    residual: Tensor, branch: Callable[..., Tensor], inputs: tuple[Tensor | None, ...], drop_prob: float, training: bool
) -> Tensor:
    """`add_branch`, whose sum it equals: the draws are those of timm's `drop_path`, a dropped sample adds nothing."""
    if not training or drop_prob == 0.0:
        return residual + branch(*inputs)
    keep_prob = 1 - drop_prob
    kept = torch.empty(residual.shape[0]).bernoulli_(keep_prob)  # [B] of 0 and 1
    samples = kept.nonzero().flatten()
    if len(samples) == len(kept):
        return residual + branch(*inputs) / keep_prob
    if len(samples) == 0:
        samples = torch.zeros(1, dtype=torch.int64)  # weight 0: the parameters still get a (zero) gradient
    out = branch(*(x if x is None else x.index_select(0, samples) for x in inputs))
    weight = kept[samples].view(-1, 1, 1) / keep_prob
    return residual.index_add(0, samples, (out * weight).to(residual.dtype))


def use_wide_products(model: nn.Module) -> None:
    """bf16 products on a CPU without bf16 instructions as fp32 ones of bf16 values (common/cpu.py says why).

    Module by module and not around the model, since activation checkpointing runs a block again by itself.
    """
    for module in model.modules():
        if isinstance(module, Encoder):
            use_cpu_kernels(module.patch_embed, *module.blocks, *getattr(module, "cls_pt_layers", ()))
            heads = (getattr(module, name, None) for name in ("lm_head", "cls_pt_lm_head", "head"))
            use_cpu_kernels(*(head for head in heads if head is not None))
    if getattr(model, "decode_task_layer", None) is not None:
        use_cpu_kernels(model.decode_task_layer)


PATCHES = {
    "plain_attention": use_plain_attention,
    "skip_dropped_samples": skip_dropped_samples,
    "wide_products": use_wide_products,
}


def apply(model: nn.Module, tokenizer: nn.Module | None, device: torch.device) -> None:
    """Prepares the model and the tokenizer that labels for it, on their device."""
    if device.type != "cpu":
        return
    for patch in chosen(PATCHES, "CPU_PATCHES_OFF").values():
        for module in {model, tokenizer} - {None}:
            patch(module)
