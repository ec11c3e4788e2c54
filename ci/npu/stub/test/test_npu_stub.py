"""Our npu patches and set-up under the real torch_npu 2.13, on fake tensors: names, schemas, dtypes, shapes, devices.

Started by `python -m ci.npu.stub`, which sets up the process; alone it is skipped. Nothing is computed here.
"""

from __future__ import annotations

import dataclasses
import inspect
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[4]
for folder in ("Beit2_for_PyTorch", "CLIP_for_PyTorch", "Data2vec_for_PyTorch", "ViT_for_PyTorch", ""):
    sys.path.insert(0, str(ROOT / folder))

torch_npu = pytest.importorskip("torch_npu", reason="started by python -m ci.npu.stub")
if not hasattr(torch_npu, "_C"):
    pytest.skip("this is the simulated torch_npu, not the real one", allow_module_level=True)

import torch  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402

from ci.npu.contract import contract  # noqa: E402
from ci.npu.contract.signatures import problem  # noqa: E402
from ci.npu.contract.uses import repository_uses  # noqa: E402
from common import device as devices  # noqa: E402
from common.profile import step_profiler  # noqa: E402
from common.update import loss_scale  # noqa: E402

NPU = torch.device("npu", 0)
MODE = FakeTensorMode()  # one for all: tensors of two modes do not mix
SMALL = {"img_size": 16, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}


@pytest.fixture
def fake():
    """Fake tensors, made on the npu unless said otherwise."""
    with MODE, NPU:
        yield


def on_npu(model: torch.nn.Module) -> torch.nn.Module:
    """A model that was built with real numbers on the host, with fake tensors on the npu in their place."""
    with MODE:
        for module in model.modules():
            for name, value in list(module._parameters.items()):
                if value is not None:
                    empty = torch.empty(value.shape, dtype=value.dtype, device=NPU)
                    module._parameters[name] = torch.nn.Parameter(empty, value.requires_grad)
            for name, value in list(module._buffers.items()):
                if value is not None:
                    module._buffers[name] = torch.empty(value.shape, dtype=value.dtype, device=NPU)
    return model


def on_npu_all(plan: Any) -> Any:
    """A tensor, or a data class of them, nested ones too, with fake tensors on the npu in the real ones' place."""
    if isinstance(plan, torch.Tensor):
        with MODE:
            return torch.empty(plan.shape, dtype=plan.dtype, device=NPU)
    if dataclasses.is_dataclass(plan):
        return dataclasses.replace(
            plan, **{f.name: on_npu_all(getattr(plan, f.name)) for f in dataclasses.fields(plan)}
        )
    return plan


def half(*shape: int, grad: bool = False) -> torch.Tensor:
    return torch.empty(*shape, dtype=torch.bfloat16, requires_grad=grad)


# -- common ------------------------------------------------------------------------------------------------------------


def test_this_is_the_real_torch_npu_on_stand_in_libraries():
    assert torch_npu.__version__.startswith(contract.REQUIRED[0]) and ".npu_stub" in torch_npu.__file__
    assert torch.npu.device_count() == 2 and torch.distributed.is_backend_available("hccl")


def test_the_device_is_resolved_and_set_up_by_common():
    # device 0 only: once a second stand-in device was current, autograd's thread for it ends the process
    assert devices.resolve("npu", 0) == NPU and devices.resolve("auto").type == "npu"
    assert devices.describe(NPU) == "Ascend910B1"
    with pytest.raises(devices.UsageError, match="only 2 are visible"):
        devices.resolve("npu", 2)
    devices.synchronize(NPU)
    assert devices.peak_memory_bytes(NPU) == 0


def test_mixed_precision_is_torch_s_own(fake):
    with devices.autocast(NPU, "bf16"):
        assert torch.nn.Linear(4, 4)(torch.empty(2, 4)).dtype == torch.bfloat16
    assert loss_scale(NPU, "fp16", "128").scale == 128.0


def test_the_profiler_opens_for_three_steps(tmp_path):
    session = step_profiler.npu_profiler(tmp_path, 3)
    assert type(session).__module__.startswith("torch_npu.profiler")
    actions = [session.schedule(step).name for step in range(4)]
    assert actions == ["RECORD", "RECORD", "RECORD_AND_SAVE", "NONE"]


# -- the contract, at run time -----------------------------------------------------------------------------------------


def test_every_use_fits_the_imported_torch_npu():
    for use in repository_uses():
        owner = {"torch": torch, "torch_npu": torch_npu}[use.name.split(".")[0]]
        *path, last = use.name.split(".")[1:]
        for name in path:
            owner = getattr(owner, name)
        if use.name == "torch.npu.config.allow_internal_format":  # can be set but not read back
            continue
        found = getattr(owner, last)
        if use.positional is not None and hasattr(found, "_schema"):
            assert problem(use, _arguments(found._schema)) is None, use
        elif use.positional is not None and inspect.isroutine(found) and not hasattr(found, "default"):
            assert problem(use, str(inspect.signature(found)).split(" -> ")[0]) is None, use


def _arguments(schema) -> str:
    return str(schema).split("::", 1)[1].partition("(")[1] + str(schema).partition("(")[2]


def test_the_extract_of_the_wheel_is_what_is_registered():
    """Names of arguments may differ in the first one (`self` in the yaml is `input` at run time)."""
    names = contract.read_extract()[contract.REQUIRED[0]]
    extract = {k.rsplit(".", 1)[1]: v for k, v in names.items() if ".ops.npu." in k}
    registered = {s.name.split("::")[1]: s for s in torch._C._jit_get_all_schemas() if s.name.startswith("npu::")}
    both = sorted(set(extract) & set(registered))
    assert len(both) > 200
    for name in ("npu_fusion_attention", "npu_fast_gelu", "npu_rms_norm", "npu_geglu", "npu_rotary_mul"):
        names = [argument.name for argument in registered[name].arguments]
        declared = [part.partition("=")[0].split()[-1] for part in extract[name][1:].split(") -> ")[0].split(", ")]
        assert names[1:] == [text for text in declared if text != "*"][1:], name


# -- BEiT v2 -----------------------------------------------------------------------------------------------------------


def test_beit2_attention_with_a_bias_and_fewer_queries(fake):
    from beit2 import npu_patches

    q, k = half(2, 4, 5, 8, grad=True), half(2, 4, 9, 8)
    out = npu_patches.fused_attend(q, k, k, torch.empty(1, 4, 5, 9), 0.25, dropout=0.1)
    assert (out.shape, out.dtype, out.device) == (q.shape, q.dtype, NPU)
    out.sum().backward()
    assert q.grad.shape == q.shape


def test_beit2_pretraining_step_with_its_patches():
    import beit2
    from beit2 import npu_patches

    model = on_npu(beit2.build_pretraining_model(**SMALL, vocab_size=8))
    tokenizer = beit2.build_tokenizer(img_size=16, patch_size=8, dim=32, depth=1, heads=2, decoder_depth=1, n_code=8)
    tokenizer = on_npu(tokenizer.for_encoding(torch.bfloat16))
    npu_patches.apply(model, tokenizer, NPU)
    with MODE, NPU, devices.autocast(NPU, "bf16"):
        assert tokenizer.get_codebook_indices(torch.empty(2, 3, 16, 16)).device == NPU
        patches = torch.zeros(2, 1, dtype=torch.long)
        logits = model(torch.empty(2, 3, 16, 16), torch.zeros(2, 4, dtype=torch.bool), masked_patches=patches)
    assert logits.shape == (2, 8)
    step(model, logits)


# -- data2vec ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("biased", [True, False])
def test_data2vec_attention_with_padding_and_bias(fake, masked, biased):
    from data2vec import npu_patches

    q, k = half(2, 4, 6, 8, grad=True), half(2, 4, 6, 8)
    mask = torch.ones(2, 6, dtype=torch.bool) if masked else None
    out = npu_patches.fused_attention(q, k, k, mask, 0.1, torch.empty(1, 4, 6, 6) if biased else None)
    assert (out.shape, out.dtype, out.device) == (q.shape, q.dtype, NPU)
    out.sum().backward()
    assert q.grad.shape == q.shape


def test_data2vec_step_with_its_patches():
    from data2vec import build_model, npu_patches

    sizes = {"embed_dim": 32, "ffn_embed_dim": 64, "layers": 2, "attention_heads": 2}
    config = {"average_top_k_layers": 2, "transformer": {"encoder": sizes, "max_source_positions": 16}}
    model = build_model(config, vocab_size=20)
    npu_patches.apply_to_model(model, NPU)
    source = torch.tensor([[0, 5, 19, 7, 2, 1], [0, 19, 6, 8, 9, 2]])  # [B, T]; 19 is <mask>, 1 is <pad>
    target = torch.where(source == 19, 4, 1)
    plan = on_npu_all(model.plan(source, target, 19))
    source, target = on_npu_all(source), on_npu_all(target)
    on_npu(model.encoder.make_teacher())  # no submodule of the model
    on_npu(model)
    with MODE, NPU, devices.autocast(NPU, "bf16"):
        out = model(source, target, 19, plan)
    assert out["pred"].shape == out["target"].shape == (2, 32) and out["loss_sum"].device == NPU
    step(model, out["pred"])


# -- CLIP --------------------------------------------------------------------------------------------------------------


def test_clip_with_its_patches():
    import clip_pretraining  # noqa: F401  mends torchvision
    from clip_pretraining import npu_patches  # isort: split
    from transformers import CLIPConfig, CLIPModel

    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision = {**tower, "image_size": 16, "patch_size": 8}
    config = CLIPConfig(text_config={**tower, "vocab_size": 50}, vision_config=vision, projection_dim=16)
    model = on_npu(CLIPModel(config))
    assert npu_patches.apply(model, NPU) == 4
    with MODE, NPU, devices.autocast(NPU, "bf16"):
        out = model(input_ids=torch.ones(2, 7, dtype=torch.long), pixel_values=torch.empty(2, 3, 16, 16))
    assert out.logits_per_image.shape == (2, 2)
    step(model, out.logits_per_image)


# -- ViT ---------------------------------------------------------------------------------------------------------------


def test_vit_with_its_patches():
    import vit
    from vit import npu_patches

    model = on_npu(vit.build_model(**SMALL, num_classes=5, global_pool="avg"))
    npu_patches.apply(model, NPU)
    with MODE, NPU, devices.autocast(NPU, "bf16"):
        logits = model(torch.empty(2, 3, 16, 16))
    assert logits.shape == (2, 5)
    step(model, logits)


def step(model: torch.nn.Module, logits: torch.Tensor) -> None:
    """Loss of [B, C], backward, clipping and fused AdamW: every gradient is where its parameter is."""
    with MODE, NPU:
        targets = torch.zeros(len(logits), dtype=torch.long)  # [B]
        loss = torch.nn.functional.cross_entropy(logits.float(), targets)
        loss.backward()
        parameters = [p for p in model.parameters() if p.grad is not None]
        assert parameters and all(p.grad.device == p.device == NPU for p in parameters)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        torch.optim.AdamW(parameters, lr=1e-3, fused=True).step()


# -- what must not pass ------------------------------------------------------------------------------------------------


def test_mistakes_are_caught(fake):
    q = half(2, 4, 6, 8)
    with pytest.raises(RuntimeError, match="attn_mask"):
        torch_npu.npu_fusion_attention(q, q, q, 4, "BNSD", attn_mask=None)
    with pytest.raises(Exception, match="cpu"):
        q + torch.empty(2, 4, 6, 8, device="cpu")
    with pytest.raises(AttributeError):
        torch_npu.npu_quick_gelu(q)
