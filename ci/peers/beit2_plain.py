"""The reference's pretraining step in plain operations: what Beit2_for_PyTorch is measured against.

Written after microsoft/unilm beit2 (modeling_pretrain.py, modeling_vqkd.py, engine_for_pretraining.py): every block
works on all tokens, dropped samples are computed and multiplied by zero, the tokenizer encodes every patch and keeps
its one-hot count of used codes, and AdamW is torch's default. It runs on the parameters of Beit2_for_PyTorch's
modules, so both sides hold the same weights.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import torch
import torch.nn.functional as F
from timm.layers import drop_path
from torch import Tensor, nn


def block(module: nn.Module, x: Tensor, bias: Tensor | None) -> Tensor:
    """A transformer block, all tokens: x [B, N, C], bias [1, H, N, N]."""
    y = attention(module.attn, module.norm1(x), bias)
    x = x + drop_path(y if module.gamma_1 is None else module.gamma_1 * y, module.drop_prob, module.training)
    y = module.mlp.fc2(F.gelu(module.mlp.fc1(module.norm2(x))))
    return x + drop_path(y if module.gamma_2 is None else module.gamma_2 * y, module.drop_prob, module.training)


def attention(module: nn.Module, x: Tensor, bias: Tensor | None) -> Tensor:
    batch, length, _ = x.shape
    qkv_bias = torch.cat((module.q_bias, torch.zeros_like(module.v_bias, requires_grad=False), module.v_bias))
    qkv = F.linear(x, module.qkv.weight, qkv_bias).reshape(batch, length, 3, module.num_heads, -1)
    q, k, v = qkv.permute(2, 0, 3, 1, 4)  # [B, H, N, d] each
    weights = (q * module.scale) @ k.transpose(-2, -1)
    if module.relative_position_bias_table is not None:
        weights = weights + table_bias(module)
    if bias is not None:
        weights = weights + bias
    out = weights.softmax(dim=-1) @ v
    return module.proj(out.transpose(1, 2).reshape(batch, length, -1))


def table_bias(module: nn.Module) -> Tensor:
    index = module.relative_position_index
    return module.relative_position_bias_table[index.view(-1)].view(*index.shape, -1).permute(2, 0, 1).contiguous()


def logits(model: nn.Module, images: Tensor, mask: Tensor) -> list[Tensor]:
    """Masked logits of the main head, and of the CLS head when there is one: images, mask bool [B, N] -> [M, V]."""
    x = model.patch_embed(images)
    weight = mask.flatten(1).unsqueeze(-1).type_as(model.mask_token)
    x = x * (1 - weight) + model.mask_token * weight
    x = torch.cat((model.cls_token.expand(len(x), -1, -1), x), dim=1)
    x = x if model.pos_embed is None else x + model.pos_embed
    bias = table_bias(model.rel_pos_bias) if model.rel_pos_bias is not None else None
    early = None
    for number, module in enumerate(model.blocks, 1):
        x = block(module, x, bias)
        if number == model.early_layers:
            early = x[:, 1:]
    outputs = [model.lm_head(model.norm(x)[:, 1:][mask])]
    if model.cls_pt:
        y = torch.cat((x[:, [0]], early), dim=1)
        for module in model.cls_pt_layers:
            y = block(module, y, bias)
        shared = model.shared_lm_head
        norm, head = (model.norm, model.lm_head) if shared else (model.cls_pt_norm, model.cls_pt_lm_head)
        outputs.append(head(norm(y)[:, 1:][mask]))
    return outputs


@torch.no_grad()
def tokens(tokenizer: nn.Module, images: Tensor) -> Tensor:
    """Visual tokens int64 [B, N] of images in [0, 1]; moves the count of used codes, as the reference does."""
    encoder, quantize = tokenizer.encoder, tokenizer.quantize
    x = encoder.patch_embed(images * 255.0 / 127.5 - 1.0)
    x = torch.cat((encoder.cls_token.expand(len(x), -1, -1), x), dim=1) + encoder.pos_embed
    for module in encoder.blocks:
        x = block(module, x, None)
    features = encoder.fc_norm(x[:, 1:])
    with torch.autocast(images.device.type, enabled=False):
        z = tokenizer.encode_task_layer(features.type_as(tokenizer.encode_task_layer[-1].weight))
    z = F.normalize(z, dim=-1).flatten(0, 1)  # [B * N, code_dim]
    codes = quantize.embedding.weight
    distances = z.pow(2).sum(1, keepdim=True) + codes.pow(2).sum(1) - 2 * torch.einsum("bd,nd->bn", z, codes)
    ids = distances.argmin(dim=1)
    one_hot = F.one_hot(ids, len(codes)).type(z.dtype)
    quantize.cluster_size.mul_(quantize.decay).add_(one_hot.sum(0), alpha=1 - quantize.decay)
    F.mse_loss(codes[ids], z)  # the commitment loss is computed and thrown away
    return ids.view(len(images), -1)


def step(
    model: nn.Module,
    tokenizer: nn.Module,
    optimizer: torch.optim.Optimizer,
    images: Tensor,
    visual: Tensor,
    mask: Tensor,
    clip: float = 3.0,
    autocast: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext,
) -> tuple[float, float]:
    """One optimizer step; returns loss and gradient norm."""
    with autocast():
        labels = tokens(tokenizer, visual)[mask]
        outputs = logits(model, images, mask)
    losses = [F.cross_entropy(values.float(), labels) for values in outputs]
    for values in outputs:
        (values.max(-1)[1] == labels).float().mean().item()
    loss = sum(losses)
    optimizer.zero_grad()
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
    optimizer.step()
    return loss.item(), norm.item()
