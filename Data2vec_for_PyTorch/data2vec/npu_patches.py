"""What an Ascend device needs beyond the common set-up. (Run on a simulated npu device only, not on Ascend hardware.)

Indices of masked tokens are made on the host by the loader for every device (`plan_batch`), so the model has no boolean
index and no `.any()` that would wait for the device. NPU_PATCHES_OFF=NAME,... leaves patches out.
"""

from __future__ import annotations

import torch
from omegaconf import DictConfig
from torch import Tensor, nn

from common import npu
from common.model import npu_layers
from common.model.patches import chosen
from data2vec.config.keys import PICTURES
from data2vec.model.attention import attention

LENGTH_MULTIPLE = 64


def use_length_buckets(config: DictConfig, for_whom: str = "npu") -> str | None:
    """Pads text batches to a few lengths, so that operators are compiled for a few shapes; returns a note when it does.

    Pads are hidden from attention: results do not change. A multiple that the user set stays.
    """
    if config.task._name in PICTURES or config.dataset.required_seq_len_multiple != 1:
        return None
    config.dataset.required_seq_len_multiple = LENGTH_MULTIPLE
    return (
        f"{for_whom}: batches are padded to multiples of {LENGTH_MULTIPLE} tokens (dataset.required_seq_len_multiple)"
    )


def use_fused_attention(model: nn.Module) -> None:
    """Attention by torch_npu's fused kernel, in student and teacher."""
    for module in model.modules():
        if hasattr(module, "attend"):
            module.attend = fused_attention


def fused_attention(
    q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, p: float, bias: Tensor | None = None
) -> Tensor:
    """`model.attention.attention` by the fused kernel; same arguments and result.

    torch_npu fuses `scaled_dot_product_attention` with a boolean mask by itself; the explicit call gives it the mask in
    the one shape that its documentation lists. In fp32, and for a bias that is to be trained (the kernel has no
    gradient for it), attention stays torch's.
    """
    trained = bias is not None and bias.requires_grad and torch.is_grad_enabled()
    if trained or q.dtype not in (torch.float16, torch.bfloat16):
        return attention(q, k, v, key_mask, p, bias)
    hidden = None
    if key_mask is not None:
        hidden = ~key_mask[:, None, None, :].expand(-1, 1, q.shape[2], -1)  # [B, 1, Q, T]
    if bias is not None:
        bias = bias.expand(len(q), -1, -1, -1).contiguous()  # [B, H, Q, T]
    return npu_layers.fused_attention(q, k, v, q.shape[-1] ** -0.5, hidden, bias, p)


CONFIG_PATCHES = {"length_buckets": use_length_buckets}
MODEL_PATCHES = {"exact_gelu": npu_layers.use_exact_gelu, "fused_attention": use_fused_attention}


def apply_to_config(config: DictConfig, device: torch.device) -> list[str]:
    """Changes the configuration for an npu; notes on what was changed. Nothing elsewhere."""
    if not npu.is_npu(device):
        return []
    patches = chosen(CONFIG_PATCHES | MODEL_PATCHES, "NPU_PATCHES_OFF")
    notes = [patches[name](config) for name in CONFIG_PATCHES if name in patches]
    return [note for note in notes if note]


def apply_to_model(model: nn.Module, device: torch.device) -> None:
    """Prepares a model on its device, before it has a teacher. Nothing is changed on cuda and cpu."""
    if npu.is_npu(device):
        patches = chosen(CONFIG_PATCHES | MODEL_PATCHES, "NPU_PATCHES_OFF")
        for name in MODEL_PATCHES:
            if name in patches:
                patches[name](model)
