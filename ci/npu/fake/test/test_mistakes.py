"""Mistakes planted into the real training of ViT: each is seen, for the right reason and at the right line."""

from pathlib import Path

import pytest
import torch
from torch_npu import watch

import run_vit
from ci.npu.fake import Event, Report
from ci.training_cases import CASES, COUNTED
from common import npu
from common.profile import precision_compare
from vit import engine

CASE = CASES["ViT_for_PyTorch"]
STEPS = 4


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    CASE.prepare(folder, COUNTED)
    return folder


@pytest.fixture
def train(pictures, tmp_path):
    """Function that trains a few steps on the device and returns the events of those after the first."""

    def run() -> list[Event]:
        watch.restart()
        run_vit.main(CASE.command(pictures, COUNTED, tmp_path, "npu", "fp32", "--max_steps", str(STEPS)))
        return Report(0, "", STEPS, tuple(Event(**row) for row in watch.rows())).between(2, STEPS)

    return run


def plant(monkeypatch, mistake):
    """Puts a mistake after the loss of `engine`: (loss, logits) -> loss."""
    right = engine.soft_target_cross_entropy
    monkeypatch.setattr(
        engine, "soft_target_cross_entropy", lambda x, target, weights: mistake(right(x, target, weights), x)
    )


def test_nothing_is_seen_where_there_is_no_mistake(train):
    assert train() == []


def test_a_cpu_tensor_in_the_loss(train, monkeypatch):
    plant(monkeypatch, lambda loss, logits: loss + torch.ones(1).sum(0, keepdim=True))
    with pytest.raises(RuntimeError, match="all tensors to be on the same device, but found .* npu:0 and cpu"):
        train()


def test_an_item_in_the_loop(train, monkeypatch):
    plant(monkeypatch, lambda loss, logits: loss if loss.item() < 1e9 else loss * 0)
    seen = train()
    assert {(e.step, e.kind, e.operator) for e in seen} == {
        (step, "host_wait", "aten::_local_scalar_dense") for step in range(2, STEPS + 1)
    }
    assert all(e.place.startswith("ci/npu/fake/test/test_mistakes.py:") for e in seen)


def test_a_boolean_index(train, monkeypatch):
    plant(monkeypatch, lambda loss, logits: loss + 0 * logits[logits > 0].sum())
    seen = train()
    assert {e.step for e in seen if e.kind == "dynamic_shape"} == set(range(2, STEPS + 1))
    assert "aten::index (boolean)" in {e.operator for e in seen}  # and its gradient's, "at backward"


def test_compile_on_npu_is_refused(pictures, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        run_vit.main(CASE.command(pictures, COUNTED, tmp_path, "npu", "fp32", "--max_steps", "2", "model.compile=true"))
    assert stop.value.code == 2 and "model.compile=true: torch.compile on npu" in capsys.readouterr().err


def test_hf32_convolutions_change_the_losses(train, monkeypatch, tmp_path):
    """Where set_up forgets its switch, the patch embedding is not fp32's: the dumps of the two part at it, by less than
    the 2e-5 that another device may differ by."""
    monkeypatch.setenv("DUMP_PRECISION", "1")
    train()
    (tmp_path / "dump_precision").rename(tmp_path.parent / f"{tmp_path.name}-right")
    monkeypatch.setattr(npu, "set_up", lambda: None)
    torch.npu.conv.allow_hf32 = True
    train()
    right = precision_compare.read(next(tmp_path.parent.glob(f"{tmp_path.name}-right/*/rank0/dump.json")))
    rows = precision_compare.compare(right, precision_compare.read(tmp_path), limit=1e-6)
    assert "ClassifyingViT.patch_embed.proj** (Conv2d): the result" in precision_compare.verdict(rows)


def test_double_precision(train, monkeypatch):
    plant(monkeypatch, lambda loss, logits: (loss.double() * 2).float())
    assert {e.kind for e in train()} == {"float64"}


def test_a_matrix_product_in_double_precision(train, monkeypatch):
    plant(monkeypatch, lambda loss, logits: loss + 0 * (logits.double() @ logits.double().T).sum().float())
    with pytest.raises(RuntimeError, match="aten::mm: float64 is not supported on npu"):
        train()
