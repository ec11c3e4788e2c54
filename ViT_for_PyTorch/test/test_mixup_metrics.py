"""Mixing and counting equal timm 0.3.2, and what is drawn depends on (seed, step, rank) alone."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from timm.loss import SoftTargetCrossEntropy

import vit
from vit.data.augment import Augmentation
from vit.data.mixup import Mix, apply_mix, cutmix_box, draw_mix
from vit.training import metrics

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(scope="module")
def golden():
    return np.load(GOLDEN / "mixup.npz")


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_soft_targets_equal_timm(golden, smoothing):
    images, labels = torch.from_numpy(golden["x"]), torch.from_numpy(golden["y"])
    for index, lam in enumerate(golden["lams"]):
        target = apply_mix(images.clone(), labels, Mix(float(lam)), 10, smoothing)[1]
        expected = torch.from_numpy(golden[f"target_lam{index}_sm{smoothing}"])
        torch.testing.assert_close(target, expected.to(target.dtype), atol=1e-6, rtol=0)


@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
def test_mixed_batches_equal_timm(golden, kind):
    images, labels = torch.from_numpy(golden["x"]).clone(), torch.from_numpy(golden["y"])
    lam, box = float(golden[f"batch_{kind}_1/lam_out"]), None
    if kind == "cutmix":
        box = tuple(golden["batch_cutmix_1/bbox_yl_yh_xl_xh"].tolist())
    mixed, target = apply_mix(images, labels, Mix(lam, box), 10, 0.1)
    torch.testing.assert_close(mixed, torch.from_numpy(golden[f"batch_{kind}_1/x"]), atol=1e-6, rtol=0)
    expected = torch.from_numpy(golden[f"batch_{kind}_1/target"])
    torch.testing.assert_close(target, expected.to(target.dtype), atol=1e-6, rtol=0)


def test_box_rule_is_that_of_timm_0_3_2(golden):
    top, bottom, left, right = golden["batch_cutmix_1/bbox_yl_yh_xl_xh"].tolist()
    lam_in, lam_out = float(golden["batch_cutmix_1/lam_in"]), float(golden["batch_cutmix_1/lam_out"])
    candidates = {
        cutmix_box(16, 20, lam_in, y, x) for y in range(16) for x in range(20)
    }  # the centre is not in the golden
    assert any(box == (top, bottom, left, right) and lam == pytest.approx(lam_out) for box, lam in candidates)
    assert cutmix_box(10, 10, 0.75, 5, 5) == ((3, 7, 3, 7), pytest.approx(0.84))  # side 5 becomes 4


def test_draw_depends_on_seed_step_and_rank_alone():
    config = Augmentation()
    draw = [draw_mix(config, 224, 224, seed=1, step=step, rank=rank) for step in range(40) for rank in range(2)]
    again = [draw_mix(config, 224, 224, seed=1, step=step, rank=rank) for step in range(40) for rank in range(2)]
    assert draw == again and len(set(draw)) == 80
    assert draw[0] != draw_mix(config, 224, 224, seed=2, step=0, rank=0)


def test_draws_follow_the_configuration():
    draws = [draw_mix(Augmentation(), 64, 96, seed=0, step=step, rank=0) for step in range(2000)]
    cut = [mix for mix in draws if mix.box]
    assert 0.45 < len(cut) / 2000 < 0.55
    for mix in cut:
        top, bottom, left, right = mix.box
        assert 0 <= top <= bottom <= 64 and 0 <= left <= right <= 96
        assert mix.lam == pytest.approx(1 - (bottom - top) * (right - left) / (64 * 96))
    shares = [mix.lam for mix in draws if not mix.box]
    assert np.mean(shares) == pytest.approx(0.5, abs=0.03)
    assert np.var(shares) == pytest.approx(0.25 / 2.6, rel=0.1)  # Beta(a, a): 1 / (4 (2a + 1))

    def boxes(**changes):
        return {draw_mix(Augmentation(**changes), 64, 64, seed=0, step=step, rank=0).box is None for step in range(50)}

    assert boxes(cutmix=0.0) == {True} and boxes(mixup=0.0) == {False}
    off = [draw_mix(Augmentation(mixup_prob=0.25), 64, 64, seed=0, step=step, rank=0) == Mix() for step in range(400)]
    assert 0.68 < np.mean(off) < 0.82
    assert draw_mix(Augmentation(mixup=0.0, cutmix=0.0), 64, 64, seed=0, step=0, rank=0) == Mix()


def test_odd_batch_keeps_its_middle_picture():
    images = torch.randn(5, 3, 8, 8)
    mixed, target = apply_mix(images.clone(), torch.arange(5), Mix(0.3), 5, 0.0)
    torch.testing.assert_close(mixed[2], images[2])
    assert target[2].tolist() == [0, 0, 1, 0, 0]


def test_counts_are_exact_over_ragged_batches():
    stored, expected = np.load(GOLDEN / "metric.npz"), json.loads((GOLDEN / "metric.json").read_text())
    logits, target = torch.from_numpy(stored["logits"]), torch.from_numpy(stored["targets"])
    assert vit.topk_counts(logits, target) == {
        "top1": expected["exact_top1_correct"],
        "top5": expected["exact_top5_correct"],
        "count": expected["N"],
    }
    total = sum(metrics.topk_correct(*part) for part in zip(logits.split(8), target.split(8), strict=True))
    assert total.tolist() == [expected["exact_top1_correct"], expected["exact_top5_correct"], expected["N"]]
    cross_entropy = metrics.soft_target_cross_entropy(logits, target.long()).item()
    assert cross_entropy == pytest.approx(expected["exact_mean_ce"], abs=1e-6)


def test_padding_counts_nowhere_and_few_classes_work():
    logits = torch.eye(4)[:, :3]
    assert vit.topk_counts(logits, torch.tensor([0, 2, 2, -1])) == {"top1": 2, "top5": 3, "count": 3}


def test_soft_loss_equals_timm():
    stored = np.load(GOLDEN / "metric.npz")
    logits, soft = torch.from_numpy(stored["loss_logits"]).float(), torch.from_numpy(stored["loss_soft_target"]).float()
    loss = metrics.soft_target_cross_entropy(logits, soft)
    assert loss.item() == pytest.approx(float(stored["soft_ce"]), abs=1e-6)
    assert loss.item() == pytest.approx(SoftTargetCrossEntropy()(logits, soft).item(), abs=1e-6)
    labels = torch.from_numpy(stored["loss_y"]).long()
    smoothed = apply_mix(torch.zeros(6, 3, 2, 2), labels, Mix(), 10, 0.1)[1]
    assert metrics.soft_target_cross_entropy(logits, smoothed).item() == pytest.approx(float(stored["ls_ce"]), abs=1e-6)


def test_ties_never_help_and_numbers_that_are_none_never_count():
    even = torch.zeros(4, 8)
    assert metrics.topk_counts(even, torch.arange(4)) == {"top1": 0, "top5": 0, "count": 4}
    logits = torch.tensor([[3.0, 3.0, 1, 0, 0, 0, 0], [5, 4, 3, 2, 1, 1, 0], [0, 1, 2, 3, 4, 5, torch.nan]])
    assert metrics.topk_counts(logits, torch.tensor([0, 4, 6])) == {"top1": 0, "top5": 1, "count": 3}
    assert metrics.topk_counts(torch.zeros(2, 3), torch.tensor([1, -1])) == {"top1": 0, "top5": 1, "count": 1}


def test_bf16_does_not_round_what_is_ranked():
    torch.manual_seed(0)
    model = vit.create_model("vit_demo", 1000).eval()
    torch.nn.init.normal_(model.head.weight, std=0.1)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        logits = model(torch.randn(256, 3, 48, 48))
    best = logits.topk(2, dim=1).values
    assert logits.dtype == torch.float32 and int((best[:, 0] == best[:, 1]).sum()) == 0
