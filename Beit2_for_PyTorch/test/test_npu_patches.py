"""What differs on an NPU, against the CPU path. The kernel itself is stood in for by its documented formula."""

import types

import pytest
import torch

import beit2
from beit2 import npu_patches
from beit2.model.blocks import Attention, attend_plainly
from beit2.model.masked_image_model import masked_rows
from common.model import npu_layers

NPU = types.SimpleNamespace(type="npu")  # torch knows the name only where torch_npu is
SCHEMA = (
    "npu_fusion_attention(Tensor query, Tensor key, Tensor value, int head_num, str input_layout, Tensor? pse=None, "
    "Tensor? padding_mask=None, Tensor? atten_mask=None, float scale=1., float keep_prob=1.) -> (Tensor, Tensor)"
)


@pytest.fixture
def npu_kernel():
    """npu_fusion_attention by its documented formula, in fp32 and rounded: softmax(scale * (pse + q k^T)) v.

    The list of its calls' output shapes."""
    calls = []
    library = torch.library.Library("npu", "FRAGMENT")
    library.define(SCHEMA)

    def kernel(q, k, v, head_num, layout, pse=None, padding_mask=None, atten_mask=None, scale=1.0, keep_prob=1.0):
        calls.append(q.shape)
        assert layout == "BNSD" and head_num == q.shape[1] and keep_prob == 1.0
        assert q.dtype in (torch.float16, torch.bfloat16) and (pse is None or pse.dtype == q.dtype)
        weights = q.float() @ k.float().transpose(-2, -1)
        weights = (weights if pse is None else weights + pse.float()) * scale
        return (weights.softmax(-1) @ v.float()).to(q.dtype), weights

    library.impl("npu_fusion_attention", kernel, "CompositeExplicitAutograd")
    yield calls
    library._destroy()


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("rows", [5, 9])
def test_fused_attention_equals_plain(npu_kernel, with_bias, rows):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 3, n, 16).bfloat16() for n in (rows, 9, 9))
    bias = torch.randn(1, 3, rows, 9) if with_bias else None
    fused = npu_patches.fused_attend(q, k, v, bias, 0.25)
    plain = attend_plainly(q.float(), k.float(), v.float(), bias, 0.25)
    torch.testing.assert_close(fused.float(), plain, rtol=2e-2, atol=2e-2)


def test_a_bias_that_is_trained_keeps_its_gradient(npu_kernel):
    q = torch.randn(2, 3, 9, 16).bfloat16()
    bias = torch.randn(1, 3, 9, 9, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        npu_patches.fused_attend(q, q, q, bias, 0.25).float().square().sum().backward()
    assert bias.grad.isfinite().all() and bias.grad.abs().sum() > 0
    with pytest.raises(ValueError, match="no gradient for a bias"):
        npu_layers.fused_attention(q, q, q, 0.25, bias=bias)


def test_recomputed_attention_has_the_gradients_of_the_plain_one(npu_kernel):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 3, n, 16).bfloat16().requires_grad_() for n in (5, 9, 9))
    bias = torch.randn(1, 3, 5, 9, requires_grad=True)
    outputs, gradients = [], []
    for function in (npu_patches.fused_attend_recomputed, attend_plainly):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = function(q, k, v, bias, 0.25)
        outputs.append(out.float())
        gradients.append(torch.autograd.grad(out.float().square().sum(), (q, k, v, bias)))
    torch.testing.assert_close(*outputs, rtol=2e-2, atol=2e-2)
    for ours, plain in zip(*gradients, strict=True):
        assert (ours.float() - plain.float()).norm() < 2e-2 * plain.float().norm()
    assert len(npu_kernel) == 1


def test_patches_are_for_npus_and_can_be_left_out(monkeypatch):
    config = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2, "vocab_size": 8}
    model = beit2.build_pretraining_model(**config)
    tokenizer = beit2.build_tokenizer(img_size=16, patch_size=8, dim=16, depth=1, heads=2, decoder_depth=1, n_code=8)
    attentions = [m for module in (model, tokenizer) for m in module.modules() if isinstance(m, Attention)]

    def patched(kind):
        if kind == "gelu":
            return {isinstance(m, npu_layers.ExactGELU) for m in model.modules()} == {True, False}
        return {m.attend is npu_patches.fused_attend for m in attentions} == {True}

    npu_patches.apply(model, tokenizer, torch.device("cpu"))
    assert not patched("gelu") and not patched("attention")
    monkeypatch.setenv("NPU_PATCHES_OFF", "fused_attention")
    npu_patches.apply(model, tokenizer, NPU)
    assert patched("gelu") and not patched("attention")
    monkeypatch.delenv("NPU_PATCHES_OFF")
    npu_patches.apply(model, tokenizer, NPU)
    assert patched("gelu") and patched("attention")
    npu_patches.apply(model, tokenizer, NPU, recompute=True)
    assert {m.attend for m in attentions} == {npu_patches.fused_attend, npu_patches.fused_attend_recomputed}
    assert {m.attend for m in tokenizer.modules() if isinstance(m, Attention)} == {npu_patches.fused_attend}
    monkeypatch.setenv("NPU_PATCHES_OFF", "fuse_attention")
    with pytest.raises(
        SystemExit, match="fuse_attention: choose from this project's patches, exact_gelu, fused_attention"
    ):
        npu_patches.apply(model, tokenizer, NPU)


def test_masked_rows_have_a_fixed_shape_and_the_order_of_boolean_indexing():
    torch.manual_seed(0)
    mask = torch.stack([torch.randperm(20) < 7 for _ in range(50)])
    x = torch.randn(50, 20, 3)
    rows = masked_rows(mask, 7)
    assert torch.equal(x.gather(1, rows.unsqueeze(-1).expand(-1, -1, 3)).flatten(0, 1), x[mask])
