"""Everything our sources call of torch_npu exists, with its arguments, in the torch_npu wheels."""

import pytest

from ci.npu.contract import contract
from ci.npu.contract.update import README, with_table
from ci.npu.contract.uses import ROOT, Use, repository_uses, uses_in


@pytest.fixture(scope="module")
def apis() -> contract.Api:
    return contract.read_extract()


@pytest.fixture(scope="module")
def uses() -> list[Use]:
    return repository_uses()


def test_every_use_fits_the_required_versions(apis, uses):
    assert contract.complaints(uses, apis) == []


def test_uses_are_found_in_all_their_spellings(uses):
    names = {use.name for use in uses}
    assert {
        "torch.npu.config.allow_internal_format",  # set
        "torch.npu.max_memory_allocated",  # torch.get_device_module(device).max_memory_allocated
        "torch.npu.set_device",  # module = getattr(torch, name); module.set_device
        "torch.ops.npu.npu_fusion_attention",
        "torch.ops.aten._fused_adamw_",  # AdamW(fused=True)
    } <= names
    spellings = """
import torch_npu as t
import torch_npu.profiler
from torch_npu.optim import NpuFusedAdamW as Fused
from torch_npu import npu_rms_norm
def f(x, device):
    Fused([x], lr=1e-3)
    npu_rms_norm(x, x, epsilon=1e-6)
    t.npu.set_device(0)
    t.profiler.profile(with_stack=False)
    return getattr(torch, "npu").empty_cache(), torch_npu.profiler.ProfilerLevel.Level1
"""
    found = [use.name for use in uses_in(spellings)]
    assert {"torch_npu.optim.NpuFusedAdamW", "torch_npu.npu_rms_norm", "torch.npu.set_device"} <= set(found)
    assert {"torch_npu.profiler.profile", "torch_npu.profiler.ProfilerLevel.Level1"} <= set(found)


def calls(expression: str) -> list[Use]:
    return uses_in(f"import torch, torch_npu\ndef f(q, x, device, **more):\n    {expression}\n", "planted.py")


@pytest.mark.parametrize(
    "good",
    [
        'torch_npu.npu_fusion_attention(q, q, q, 8, "BNSD", pse=x, atten_mask=x, scale=0.1, keep_prob=0.9)',
        'torch.ops.npu.npu_fusion_attention.default(q, q, q, head_num=8, input_layout="BNSD")',
        "torch_npu.npu_fast_gelu(x)",
        "torch.npu.set_compile_mode(jit_compile=False)",
        "torch.npu.config.allow_internal_format = False",
        "torch_npu.optim.NpuFusedAdamW([x], lr=1e-3, betas=(0.9, 0.99))",
        "torch.npu.amp.GradScaler(dynamic=False)",
        "torch.get_device_module(device).reset_peak_memory_stats()",
        "torch_npu.npu_geglu(**more)",
    ],
)
def test_right_calls_pass(apis, good):
    uses = calls(good)
    assert uses and contract.complaints(uses, apis) == []


@pytest.mark.parametrize(
    ("planted", "words"),
    [
        ('torch_npu.npu_fusion_attention(q, q, q, 8, "BNSD", attn_mask=x)', "has no argument attn_mask"),
        ('torch.ops.npu.npu_fusion_attention(q, q, q, 8, "BNSD", pre_tokens=1)', "has no argument pre_tokens"),
        ("torch.ops.npu.npu_fusion_attention(q, q, q, 8)", "needs input_layout"),
        ("torch_npu.npu_fast_gelu(x, approximate='tanh')", "has no argument approximate"),
        ("torch_npu.npu_fast_gelu(x, x)", "takes 1 positional arguments, not 2"),
        ("torch_npu.npu_quick_gelu(x)", "does not exist"),
        ("torch.npu.set_compile_mode(jit=False)", "has no argument jit"),
        # torch_npu ignores an unknown option without a word
        ("torch.npu.config.allow_internal_formats = False", "does not exist"),
        ("torch_npu.optim.NpuFusedAdamW([x], fused=True)", "has no argument fused"),
        ("torch.get_device_module(device).peak_memory()", "does not exist"),
    ],
)
def test_planted_mistakes_are_caught(apis, planted, words):
    found = contract.complaints(calls(planted), apis)
    assert len(found) == len(contract.REQUIRED), found
    assert all(line.startswith("planted.py:3: ") and words in line for line in found)


@pytest.mark.parametrize(
    ("file", "right", "wrong"),
    [("model/npu_layers.py", "atten_mask=", "attn_mask="), ("npu.py", "jit_compile=", "jit=")],
)
def test_a_mistake_planted_in_common_is_caught(apis, file, right, wrong):
    source = (ROOT / "common" / file).read_text(encoding="utf-8")
    assert right in source and contract.complaints(uses_in(source, file), apis) == []
    found = contract.complaints(uses_in(source.replace(right, wrong), file), apis)
    assert found and all(f"has no argument {wrong[:-1]}" in line for line in found)


def test_older_versions_are_told_apart(apis):
    newer = calls('torch_npu.npu_fusion_attention(q, q, q, 8, "BNSD", sink=x)')  # an argument since 2.9
    assert contract.complaints(newer, apis) == []
    assert contract.complaints(newer, apis, ["2.6.0"]) != []
    assert "has no argument sink | yes |" in contract.table(newer, apis)
    assert contract.complaints(calls("torch.npu.set_deterministic_level(1)"), apis, ["2.9.0"]) != []


def test_the_table_in_the_readme_is_of_these_sources(apis, uses):
    text = README.read_text(encoding="utf-8")
    now = with_table(text, contract.table(uses, apis))
    assert text == now, "python -m ci.npu.contract.update --offline renews the table"
