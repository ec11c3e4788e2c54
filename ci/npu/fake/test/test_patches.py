"""Every patch of every project computes on the simulated device what the project computes on the CPU."""

import copy
import inspect
import textwrap

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import beit2
import clip_pretraining  # noqa: F401 - repairs torchvision
from beit2 import npu_patches as beit2_patches
from beit2.model.blocks import attend
from clip_pretraining import npu_patches as clip_patches
from clip_pretraining.model.layers import full_attention_mask
from common.model import npu_layers
from data2vec import npu_patches as data2vec_patches
from data2vec.model.attention import attention
from vit import npu_patches as vit_patches

NPU = torch.device("npu")
BF16 = {"atol": 3e-2, "rtol": 3e-2}
PATCHES = {
    "vit": vit_patches.PATCHES,
    "beit2": beit2_patches.PATCHES,
    "clip": clip_patches.PATCHES,
    "data2vec": data2vec_patches.CONFIG_PATCHES | data2vec_patches.MODEL_PATCHES,
}


def assert_equal(function, on_cpu, inputs, dtype=torch.float32, **tolerance):
    """Values and gradients of `function` on the device, in `dtype`, against `on_cpu` in fp32."""
    host = [x.detach().requires_grad_(x.is_floating_point()) for x in inputs]
    there = [x.detach().to(NPU, dtype if x.is_floating_point() else None) for x in inputs]
    there = [x.requires_grad_(x.is_floating_point()) for x in there]
    expected, got = on_cpu(*host), function(*there)
    torch.testing.assert_close(got.float().cpu(), expected, **tolerance)
    weights = torch.randn_like(expected)
    (expected * weights).sum().backward()
    (got.float() * weights.to(NPU)).sum().backward()
    for a, b in zip(host, there, strict=True):
        if a.requires_grad:
            torch.testing.assert_close(b.grad.float().cpu(), a.grad, **tolerance)


@pytest.mark.parametrize("project", PATCHES)
def test_each_patch_says_why(project):
    for name, patch in PATCHES[project].items():
        assert len(inspect.getdoc(patch) or "") > 60, name


# -- exact_gelu ------------------------------------------------------------------------------------------------------


def test_torch_s_gelu_is_another_function_on_the_device():
    x = torch.linspace(-4, 4, 200)
    assert (F.gelu(x.to(NPU)).cpu() - F.gelu(x)).abs().max() > 1e-4


@pytest.mark.parametrize("function", [npu_layers.exact_gelu, npu_layers.ExactGELU()])
def test_exact_gelu(function):
    assert_equal(function, F.gelu, [torch.randn(40, 5) * 3], atol=1e-6, rtol=1e-5)


def test_exact_gelu_in_a_model():
    model = nn.Sequential(nn.Linear(4, 4), nn.GELU(), nn.Sequential(nn.GELU()), nn.GELU(approximate="tanh"))
    patched = copy.deepcopy(model).to(NPU)
    assert npu_layers.use_exact_gelu(patched) == 2
    assert isinstance(patched[3], nn.GELU)
    assert_equal(patched, model, [torch.randn(3, 4)], atol=1e-6, rtol=1e-5)


def test_roberta_s_activation():
    from transformers.activations import GELUActivation

    model = nn.Sequential(GELUActivation())
    patched = copy.deepcopy(model)
    assert clip_patches.use_exact_gelu(patched) == 1
    assert_equal(patched, model, [torch.randn(3, 4)], atol=1e-6, rtol=1e-5)


# -- quick_gelu ------------------------------------------------------------------------------------------------------


def test_quick_gelu():
    from transformers.activations import QuickGELUActivation

    model = nn.Sequential(QuickGELUActivation())
    patched = copy.deepcopy(model)
    assert clip_patches.use_fused_quick_gelu(patched) == 1
    assert_equal(patched, model, [torch.randn(30, 4) * 3], atol=1e-6, rtol=1e-5)


# -- fused_attention -------------------------------------------------------------------------------------------------


def heads(queries=5, keys=7):
    return [torch.randn(3, 2, n, 8) for n in (queries, keys, keys)]


def check_data2vec_attention(function):
    """An implementation of data2vec's attention, with padded keys, against the CPU's."""
    seen = torch.arange(7) < torch.tensor([7, 4, 2])[:, None]  # bool [B, T]
    for key_mask in (seen, None):
        there = None if key_mask is None else key_mask.to(NPU)
        assert_equal(
            lambda q, k, v, mask=there: function(q, k, v, mask, 0.0),
            lambda q, k, v, mask=key_mask: attention(q, k, v, mask, 0.0),
            heads(),
            torch.bfloat16,
            **BF16,
        )


def test_data2vec_attention():
    check_data2vec_attention(data2vec_patches.fused_attention)


def test_data2vec_attention_with_a_bias():
    bias = torch.randn(2, 5, 7)
    assert_equal(
        lambda q, k, v: data2vec_patches.fused_attention(q, k, v, None, 0.0, bias.to(NPU)),
        lambda q, k, v: attention(q, k, v, None, 0.0, bias),
        heads(),
        torch.bfloat16,
        **BF16,
    )


@pytest.mark.parametrize("samples", [None, 1, 3])
def test_beit2_attention(samples):
    bias = None if samples is None else torch.randn(samples, 2, 5, 7)
    there = None if bias is None else bias.to(NPU)
    assert_equal(
        lambda q, k, v: beit2_patches.fused_attend(q, k, v, there, 0.25),
        lambda q, k, v: attend(q, k, v, bias, 0.25),
        heads(),
        torch.bfloat16,
        **BF16,
    )


def test_attention_with_dropout_keeps_the_mean():
    q, k, v = (x.to(NPU, torch.bfloat16) for x in heads())
    v = torch.ones_like(v)
    out = torch.stack([npu_layers.fused_attention(q, k, v, 0.35, p=0.5).float().mean() for _ in range(200)])
    assert out.mean().item() == pytest.approx(1.0, abs=0.05) and out.std().item() > 0.01


def test_the_backward_pass_drops_what_the_forward_pass_dropped(events):
    """The output is linear in v: its gradient has to give the output back."""
    q, k, v = (x.to(NPU) for x in heads())
    v.requires_grad_()
    events.clear()
    out = npu_layers.fused_attention(q, k, v, 0.35, p=0.5)
    (out * torch.ones_like(out)).sum().backward()
    assert events == []
    torch.testing.assert_close((v.grad * v).sum().cpu(), out.sum().cpu())


def test_attention_of_a_beit2_model_is_fused_where_nothing_is_trained():
    config = {"img_size": 16, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "vocab_size": 8}
    model = beit2.build_pretraining_model(**config, use_shared_rel_pos_bias=True).eval()
    images = torch.randn(2, 3, 16, 16)
    mask = torch.tensor([[True, False, True, False]] * 2)
    with torch.no_grad():
        expected = model(images, mask)
        beit2_patches.apply(model.to(NPU), None, NPU)
        with torch.autocast("npu", dtype=torch.bfloat16):
            got = model(images.to(NPU), mask.to(NPU))
    torch.testing.assert_close(got.float().cpu(), expected, atol=5e-2, rtol=5e-2)


# -- masks of CLIP's text models ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["clip", "roberta"])
def test_a_full_attention_mask_is_the_same_mask(family, events):
    from transformers import CLIPTextConfig, CLIPTextModel, RobertaConfig, RobertaModel

    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    if family == "clip":
        model = CLIPTextModel(CLIPTextConfig(**sizes, vocab_size=20, max_position_embeddings=12, eos_token_id=3))
    else:
        model = RobertaModel(RobertaConfig(**sizes, vocab_size=20, max_position_embeddings=16))
    model.eval()
    tokens = torch.randint(4, 20, (3, 9))
    mask = (torch.arange(9) < torch.tensor([9, 5, 2])[:, None]).long()
    expected = model(input_ids=tokens, attention_mask=mask).last_hidden_state[:, 0]
    model.to(NPU)
    clip_patches.apply(model, NPU)
    tokens, mask = tokens.to(NPU), mask.to(NPU)
    events.clear()
    got = model(input_ids=tokens, attention_mask=full_attention_mask(mask, model)).last_hidden_state[:, 0]
    assert events == []
    torch.testing.assert_close(got.cpu(), expected, atol=1e-5, rtol=1e-5)


# -- mistakes that these tests must see --------------------------------------------------------------------------------


def mutated(function, old: str, new: str):
    """The function with a planted mistake in its source."""
    source = textwrap.dedent(inspect.getsource(function))
    assert old in source
    scope = dict(function.__globals__)
    exec(compile(source.replace(old, new), "planted", "exec"), scope)  # noqa: S102
    return scope[function.__name__]


def test_a_wrong_keyword_is_seen(monkeypatch):
    wrong = mutated(npu_layers.fused_attention, "atten_mask=hidden", "attn_mask=hidden")
    monkeypatch.setattr(npu_layers, "fused_attention", wrong)
    with pytest.raises(RuntimeError, match="Unknown keyword argument 'attn_mask' for operator 'npu::npu_fusion_attent"):
        check_data2vec_attention(data2vec_patches.fused_attention)


def test_an_inverted_mask_is_seen():
    wrong = mutated(data2vec_patches.fused_attention, "hidden = ~key_mask", "hidden = key_mask")
    with pytest.raises(AssertionError, match="Tensor-likes are not close"):
        check_data2vec_attention(wrong)


def test_a_bias_that_is_not_divided_by_the_scale_is_seen(monkeypatch):
    monkeypatch.setattr(npu_layers, "fused_attention", mutated(npu_layers.fused_attention, "bias / scale", "bias"))
    with pytest.raises(AssertionError, match="Tensor-likes are not close"):
        test_beit2_attention(1)
