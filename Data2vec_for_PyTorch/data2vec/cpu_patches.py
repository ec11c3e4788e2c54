"""What a CPU does otherwise, each change a named function with its reason; the models know nothing of it.

CPU_PATCHES_OFF=NAME,... leaves patches out. The mathematics is the same; dropout draws other numbers of the same
distribution.
"""

from __future__ import annotations

import torch
from torch import nn

from common.cpu import use_cpu_kernels
from common.model.patches import chosen
from data2vec import cpu_dropout
from data2vec.model.multi.decoder import Decoder
from data2vec.model.transformer_block import TransformerBlock


def use_cheap_dropout(model: nn.Module) -> None:
    """Dropout masks from 16 random bits an element, and attention with dropout a head at a time in buffers that stay in
    the cache: torch's own CPU kernels spend most of a step there."""
    for module in model.modules():
        if hasattr(module, "attend"):
            module.attend = cpu_dropout.attention
        if hasattr(module, "dropout_add"):
            module.dropout_add = cpu_dropout.dropout_add


def use_wide_products(model: nn.Module) -> None:
    """bf16 products on a CPU without bf16 instructions as fp32 ones of bf16 values (common/cpu.py says why).

    Module by module and not around the model, since activation checkpointing runs a layer again by itself.
    """
    for module in model.modules():
        if isinstance(module, TransformerBlock | Decoder):
            use_cpu_kernels(module)
        heads = ("proj",) if isinstance(module, Decoder) else ("regression_head", "final_proj")
        use_cpu_kernels(*(getattr(module, head) for head in heads if hasattr(module, head)))


PATCHES = {"cheap_dropout": use_cheap_dropout, "wide_products": use_wide_products}


def apply_to_model(model: nn.Module, device: torch.device) -> None:
    """Prepares a model on its device, before it has a teacher. Nothing is changed on npu and cuda."""
    if device.type == "cpu":
        for patch in chosen(PATCHES, "CPU_PATCHES_OFF").values():
            patch(model)
