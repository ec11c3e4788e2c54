"""These tests need the simulated device in their own process: ci/test/test_npu_device.py starts them."""

import pytest
import torch

import vit  # noqa: F401 - repairs torchvision before a project imports timm

if not hasattr(torch, "npu"):
    raise pytest.UsageError("start these tests with: python -m pytest ci/test/test_npu_device.py")
import torch_npu

torch.set_num_threads(1)


@pytest.fixture
def events(monkeypatch):
    """List of the (kind, operator) that csrc/observe.h tells of during the test."""
    from torch_npu import build, watch

    seen: list[tuple[str, str]] = []
    native = build.load()
    native.observe(lambda kind, operator: seen.append((kind, operator)))
    yield seen
    native.observe(watch.note)


@pytest.fixture(autouse=True)
def simulated():
    assert torch_npu.SIMULATED
    torch.manual_seed(0)
    torch.npu.conv.allow_hf32 = False  # as common.npu.set_up; a new process begins with True
