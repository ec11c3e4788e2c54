"""The reference's data2vec text step, written plainly: what fairseq runs on a modern torch, without fairseq.

`F.multi_head_attention_forward` with key masks, torch's dropout, the teacher over the full-length padded sequence,
every layer over all rows, per-tensor EMA and Adam. It works on our model's weights, and equals the goldens (a test).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F


def encoder_layer(layer, x: torch.Tensor, padding: torch.Tensor | None, training: bool):
    """fairseq TransformerEncoderLayerBase, post-LN; x [T, B, C]. Returns (x, fc_result)."""
    a = layer.self_attn
    y, _ = F.multi_head_attention_forward(
        x,
        x,
        x,
        x.shape[-1],
        a.heads,
        torch.empty([0]),
        torch.cat((a.q_proj.bias, a.k_proj.bias, a.v_proj.bias)),
        None,
        None,
        False,
        a.dropout,
        a.out_proj.weight,
        a.out_proj.bias,
        training,
        padding,
        need_weights=False,
        use_separate_proj_weight=True,
        q_proj_weight=a.q_proj.weight,
        k_proj_weight=a.k_proj.weight,
        v_proj_weight=a.v_proj.weight,
    )
    x = layer.self_attn_layer_norm(x + F.dropout(y, layer.dropout, training))
    hidden = F.gelu(layer.fc1(x).float()).type_as(x)
    result = layer.fc2(hidden)
    return layer.final_layer_norm(x + F.dropout(result, layer.dropout, training)), result


def encode(encoder, tokens: torch.Tensor, training: bool):
    """(hidden states [B, T, C], every layer's fc_result [T, B, C])."""
    padding = tokens.eq(1)
    has_padding = bool(padding.any())
    positions = (torch.cumsum(tokens.ne(1), dim=1) * tokens.ne(1)).long() + 1
    x = encoder.layernorm_embedding(encoder.embed_tokens(tokens) + encoder.embed_positions(positions))
    x = F.dropout(x, encoder.config.dropout, training)
    if has_padding:
        x = x * (1 - padding.unsqueeze(-1).type_as(x))
    x = x.transpose(0, 1)
    results = []
    for layer in encoder.layers:
        x, result = encoder_layer(layer, x, padding if has_padding else None, training)
        results.append(result)
    return x.transpose(0, 1), results


def loss_of(model, src_tokens: torch.Tensor, target_tokens: torch.Tensor, mask_idx: int):
    """(loss sum, sample size) with layer-normalised targets of the top layers."""
    with torch.no_grad():
        _, results = encode(model.encoder.teacher, target_tokens, training=False)
        results = results[-model.targets.average_top_k_layers :]
        y = sum(F.layer_norm(r.float(), r.shape[-1:]) for r in results) / len(results)
        y = y.transpose(0, 1)
    masked = src_tokens.eq(mask_idx)
    x, _ = encode(model.encoder.sentence_encoder, src_tokens, model.training)
    x = model.encoder.regression_head(x[masked])
    loss = F.smooth_l1_loss(x.float(), y[masked].float(), reduction="none", beta=model.config.loss_beta)
    return loss.sum(dim=-1).sum() * model.config.loss_scale, int(masked.sum())


@torch.no_grad()
def ema_step(model, decay: float) -> None:
    teacher = dict(model.encoder.teacher.named_parameters())
    for name, parameter in model.encoder.sentence_encoder.named_parameters():
        if name.startswith(("embed_tokens", "embed_positions", "layernorm_embedding")):
            teacher[name].copy_(parameter)
        else:
            teacher[name].mul_(decay).add_(parameter.float(), alpha=1 - decay)


class PlainAdam:
    """fairseq's Adam, tensor by tensor (fairseq/optim/adam.py)."""

    def __init__(self, parameters, betas=(0.9, 0.98), eps: float = 1e-6, weight_decay: float = 0.01):
        self.parameters = list(parameters)
        self.betas, self.eps, self.weight_decay = betas, eps, weight_decay
        self.steps = 0
        self.moments = [(torch.zeros_like(p), torch.zeros_like(p)) for p in self.parameters]

    @torch.no_grad()
    def step(self, lr: float) -> None:
        self.steps += 1
        b1, b2 = self.betas
        size = lr * math.sqrt(1 - b2**self.steps) / (1 - b1**self.steps)
        for p, (m, v) in zip(self.parameters, self.moments, strict=True):
            m.mul_(b1).add_(p.grad, alpha=1 - b1)
            v.mul_(b2).addcmul_(p.grad, p.grad, value=1 - b2)
            p.add_(p, alpha=-self.weight_decay * lr)
            p.addcdiv_(m, v.sqrt().add_(self.eps), value=-size)
            p.grad = None


def step(model, optimizer: PlainAdam, batch, mask_idx: int, lr: float, decay: float, clip: float, autocast):
    """One update; (loss, gradient norm)."""
    if model.encoder.teacher is None:
        model.encoder.make_teacher()
    else:
        ema_step(model, decay)
    with autocast():
        loss, sample_size = loss_of(model, *batch, mask_idx)
    loss.backward()
    with torch.no_grad():
        for p in optimizer.parameters:
            p.grad.mul_(1 / sample_size)
        norm = torch.norm(torch.stack([torch.norm(p.grad) for p in optimizer.parameters]))
        coefficient = (clip / (norm + 1e-6)).clamp(max=1)
        for p in optimizer.parameters:
            p.grad.mul_(coefficient)
    optimizer.step(lr)
    return loss.item() / sample_size, norm.item()
