"""CPU references of torch_npu's own operators that this repository calls, under torch_npu's schemas.

Only what the repository uses is here; a new use fails with "no attribute" until its reference is written. Formulas and
limits are those of torch_npu's and CANN's documentation, quoted where they surprise.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.library import Library, register_autograd

# npu_native_functions_by_codegen.yaml of torch_npu 2.13; the first argument of the activations is named `input` at run
# time (`self` in the file)
SCHEMAS = (
    "npu_fusion_attention(Tensor query, Tensor key, Tensor value, int head_num, str input_layout, Tensor? pse=None, "
    "Tensor? padding_mask=None, Tensor? atten_mask=None, float scale=1., float keep_prob=1., "
    "int pre_tockens=2147483647, int next_tockens=2147483647, int inner_precise=0, int[]? prefix=None, "
    "int[]? actual_seq_qlen=None, int[]? actual_seq_kvlen=None, int sparse_mode=0, bool gen_mask_parallel=True, "
    "bool sync=False, str softmax_layout='', Tensor? sink=None, Tensor? dropout_mask=None, int seed=0, int offset=0) "
    "-> (Tensor, Tensor, Tensor, Tensor, int, int, int)",
    "npu_fast_gelu(Tensor input) -> Tensor",
    "npu_gelu(Tensor input, *, str approximate='none') -> Tensor",
    "npu_gelu_backward(Tensor grad_output, Tensor self, *, str approximate='none') -> Tensor",
)
NAMES = tuple(schema.split("(")[0] for schema in SCHEMAS)
_HALVES_AND_SINGLE = (torch.float16, torch.bfloat16, torch.float32)
_library: Library | None = None  # the operators live as long as it does


def register() -> None:
    """Defines the operators in the namespace `npu`, with their gradients."""
    global _library
    _library = Library("npu", "DEF")
    for schema in SCHEMAS:
        random = (torch.Tag.nondeterministic_seeded,) if schema.startswith("npu_fusion_attention") else ()
        _library.define(schema, tags=random)
    kernels = (_attention, _fast_gelu, _gelu, torch.ops.aten.gelu_backward)
    for name, kernel in zip(NAMES, kernels, strict=True):
        _library.impl(name, kernel, "CPU")  # reached from npu tensors like every CPU kernel
    register_autograd("npu::npu_fusion_attention", _attention_backward, setup_context=_keep_for_attention, lib=_library)
    register_autograd("npu::npu_fast_gelu", _fast_gelu_backward, setup_context=_keep_input, lib=_library)
    register_autograd("npu::npu_gelu", _gelu_backward, setup_context=_keep_gelu, lib=_library)


# -- npu_fusion_attention ---------------------------------------------------------------------------------------------


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    head_num: int,
    input_layout: str,
    pse: Tensor | None = None,
    padding_mask: Tensor | None = None,
    atten_mask: Tensor | None = None,
    scale: float = 1.0,
    keep_prob: float = 1.0,
    pre_tockens: int = 2147483647,
    next_tockens: int = 2147483647,
    inner_precise: int = 0,
    prefix=None,
    actual_seq_qlen=None,
    actual_seq_kvlen=None,
    sparse_mode: int = 0,
    gen_mask_parallel: bool = True,
    sync: bool = False,
    softmax_layout: str = "",
    sink: Tensor | None = None,
    dropout_mask: Tensor | None = None,
    seed: int = 0,
    offset: int = 0,
):
    """dropout(softmax(mask(scale * (pse + q k^T), atten_mask))) v.

    `pse` is added *before* the scale (the documentation's formula, pse_type 1), and True in `atten_mask` hides a
    position, the reverse of torch's masks.
    """
    if (sparse_mode, prefix, actual_seq_qlen, actual_seq_kvlen, sink, dropout_mask) != (0, *[None] * 5):
        raise NotImplementedError("npu_fusion_attention: the simulated device has sparse_mode 0 alone, and no lengths")
    _check_attention(query, key, value, head_num, input_layout, pse, padding_mask, atten_mask)
    heads = [_to_heads(t, head_num, input_layout) for t in (query, key, value)]  # [B, N, S, D] each
    seed = int(torch.randint(2**31, ())) if keep_prob < 1 else 0
    probabilities, maximum, total = _probabilities(*heads[:2], pse, atten_mask, scale)
    kept = _dropped(probabilities, keep_prob, seed)
    out = _from_heads((kept @ heads[2].float()).to(query.dtype), input_layout)
    eight = (*maximum.shape[:3], 8)  # the kernel's own layout of these two
    empty = torch.empty(0, dtype=query.dtype)
    return out, maximum.expand(eight).clone(), total.expand(eight).clone(), empty, seed, 0, probabilities.numel()


def _check_attention(query, key, value, head_num, layout, pse, padding_mask, atten_mask) -> None:
    if layout not in ("BSH", "SBH", "BSND", "BNSD"):
        raise ValueError(f"npu_fusion_attention: input_layout {layout!r} is not BSH, SBH, BSND or BNSD")
    if padding_mask is not None:
        raise ValueError("npu_fusion_attention: padding_mask is not supported")
    tensors = [query, key, value, *([] if pse is None else [pse])]
    if len({t.dtype for t in tensors}) > 1 or query.dtype not in _HALVES_AND_SINGLE:
        raise ValueError(f"npu_fusion_attention: types of q, k, v and pse must agree: {[t.dtype for t in tensors]}")
    batch, heads, rows, _ = _to_heads(query, head_num, layout).shape
    columns = _to_heads(key, head_num, layout).shape[2]
    if layout in ("BNSD", "BSND") and heads != head_num:
        raise ValueError(f"npu_fusion_attention: head_num {head_num}, but the query has {heads} heads")
    allowed = [(batch, heads, rows, columns), (1, heads, rows, columns), (batch, heads, 1, columns)]
    if pse is not None and tuple(pse.shape) not in allowed:
        raise ValueError(f"npu_fusion_attention: pse of shape {tuple(pse.shape)} is none of {allowed}")
    if atten_mask is None:
        return
    if atten_mask.dtype not in (torch.bool, torch.uint8):
        raise ValueError(f"npu_fusion_attention: atten_mask must be bool or uint8, not {atten_mask.dtype}")
    allowed = [(batch, heads, rows, columns), (batch, 1, rows, columns), (1, 1, rows, columns), (rows, columns)]
    if tuple(atten_mask.shape) not in allowed:
        raise ValueError(f"npu_fusion_attention: atten_mask of shape {tuple(atten_mask.shape)} is none of {allowed}")


def _to_heads(t: Tensor, heads: int, layout: str) -> Tensor:
    if layout == "BNSD":
        return t
    if layout == "BSND":
        return t.transpose(1, 2)
    t = t if layout == "BSH" else t.transpose(0, 1)
    return t.unflatten(2, (heads, -1)).transpose(1, 2)


def _from_heads(t: Tensor, layout: str) -> Tensor:
    if layout == "BNSD":
        return t.contiguous()
    t = t.transpose(1, 2)
    if layout == "BSND":
        return t.contiguous()
    t = t.flatten(2)
    return t.contiguous() if layout == "BSH" else t.transpose(0, 1).contiguous()


def _probabilities(query, key, pse, atten_mask, scale) -> tuple[Tensor, Tensor, Tensor]:
    """fp32 softmax [B, N, S, T], the rows' maxima and sums [B, N, S, 1]. A row that is all hidden gives zeros."""
    scores = query.float() @ key.float().mT
    if pse is not None:
        scores = scores + pse.float()
    scores = scores * scale
    if atten_mask is not None:
        scores = scores.masked_fill(atten_mask.bool(), float("-inf"))
    maximum = scores.amax(dim=-1, keepdim=True).clamp(min=torch.finfo(torch.float32).min)
    exponentials = (scores - maximum).exp()
    total = exponentials.sum(dim=-1, keepdim=True)
    return exponentials / total.clamp(min=torch.finfo(torch.float32).tiny), maximum, total


def _dropped(probabilities: Tensor, keep_prob: float, seed: int) -> Tensor:
    return probabilities * _dropout_factors(probabilities, keep_prob, seed) if keep_prob < 1 else probabilities


def _dropout_factors(like: Tensor, keep_prob: float, seed: int) -> Tensor:
    generator = torch.Generator(like.device).manual_seed(seed)  # the same numbers on the device and on the host
    kept = torch.rand(like.shape, generator=generator, device=like.device) < keep_prob
    return kept.float() / keep_prob


def _keep_for_attention(ctx, inputs, output) -> None:
    query, key, value, ctx.heads, ctx.layout, pse, _, atten_mask, ctx.scale, ctx.keep_prob = inputs[:10]
    ctx.seed = output[4]
    ctx.save_for_backward(query, key, value, pse, atten_mask)


def _attention_backward(ctx, gradient, *_):
    query, key, value, pse, atten_mask = ctx.saved_tensors
    q, k, v, dout = (_to_heads(t, ctx.heads, ctx.layout).float() for t in (query, key, value, gradient))
    probabilities, _, _ = _probabilities(q, k, pse, atten_mask, ctx.scale)
    factors = _dropout_factors(probabilities, ctx.keep_prob, ctx.seed) if ctx.keep_prob < 1 else 1.0
    dprobabilities = (dout @ v.mT) * factors
    dscores = probabilities * (dprobabilities - (dprobabilities * probabilities).sum(dim=-1, keepdim=True)) * ctx.scale
    gradients = (dscores @ k, dscores.mT @ q, (probabilities * factors).mT @ dout)
    dq, dk, dv = (_from_heads(g, ctx.layout).to(query.dtype) for g in gradients)
    # CANN's page of aclnnFlashAttentionScoreGrad: dpseOut is "not used for now". torch_npu hands on memory that no one
    # has written; nan here, so that whoever trains a bias through it sees it.
    dpse = torch.full_like(pse, float("nan")) if pse is not None and ctx.needs_input_grad[5] else None
    return dq, dk, dv, None, None, dpse, *[None] * 18


# -- activations ------------------------------------------------------------------------------------------------------


def _fast_gelu(input: Tensor) -> Tensor:
    """x sigmoid(1.702 x), as torch_npu's page has it (written there with |x|)."""
    _check_activation("npu_fast_gelu", input)
    return (input.float() * torch.sigmoid(1.702 * input.float())).to(input.dtype)


def _fast_gelu_backward(ctx, gradient: Tensor) -> Tensor:
    (x,) = ctx.saved_tensors
    s = torch.sigmoid(1.702 * x.float())
    return (gradient.float() * (s + 1.702 * x.float() * s * (1 - s))).to(x.dtype)


def _gelu(input: Tensor, *, approximate: str = "none") -> Tensor:
    _check_activation("npu_gelu", input)
    return F.gelu(input, approximate=approximate)


def _gelu_backward(ctx, gradient: Tensor) -> Tensor:
    (x,) = ctx.saved_tensors
    return torch.ops.npu.npu_gelu_backward(gradient, x, approximate=ctx.approximate)


def _check_activation(name: str, input: Tensor) -> None:
    if input.dtype not in _HALVES_AND_SINGLE or input.ndim > 8:
        raise ValueError(f"{name}: takes float16, bfloat16 or float32 of at most 8 dimensions, not {input.dtype}")


def _keep_input(ctx, inputs, output) -> None:
    ctx.save_for_backward(inputs[0])


def _keep_gelu(ctx, inputs, keyword_only_inputs, output) -> None:
    ctx.approximate = keyword_only_inputs["approximate"]
    ctx.save_for_backward(inputs[0])
