"""ci/scaling.py: the formulas at values that can be checked by hand, and the command on a real small run."""

import json

import pytest

from ci import scaling
from ci.scaling import Cluster, Link
from ci.training_cases import COUNTED

FAST = Link(latency=0.0, bandwidth=1e9)
STEP = {
    "project": "ViT_for_PyTorch",
    "step_s": 0.3,
    "samples": 8,
    "gradient_bytes": 100e6,
    "unit_bytes": 10e6,
    "state_bytes": 300e6,
    "activation_bytes": 50e6,
}


def test_a_ring_moves_twice_the_bytes_less_one_share_and_waits_for_every_step():
    assert FAST.all_reduce(1e9, 1) == 0
    assert FAST.all_reduce(1e9, 2) == pytest.approx(1.0)
    assert FAST.all_reduce(1e9, 4) == pytest.approx(1.5)
    assert Link(0.01, 1e9).all_reduce(0, 4) == pytest.approx(6 * 0.01)
    slow_outside = Cluster(FAST, Link(0.0, 1e8), cards_per_server=4)
    assert slow_outside.all_reduce(1e9, 4) == pytest.approx(1.5)
    assert slow_outside.all_reduce(1e9, 8) == pytest.approx(1.5 + 2.5)  # a quarter of the bytes on each card's network


def test_latency_and_bandwidth_are_found_again_from_two_sizes():
    link = Link(0.002, 5e7)
    for ranks in (2, 4):
        found = scaling.fit({size: link.all_reduce(size, ranks) for size in (10_000, 5_000_000)}, ranks)
        assert (found.latency, found.bandwidth) == pytest.approx((link.latency, link.bandwidth))


def test_buckets_hide_behind_backward_but_for_the_last():
    buckets = scaling.in_buckets(2.5 * scaling.BUCKET)
    assert len(buckets) == 3 and sum(buckets) == pytest.approx(2.5 * scaling.BUCKET)
    assert scaling.exposed([1, 1, 1], 30, lambda size: 2 * size) == pytest.approx(2)  # the last one
    assert scaling.exposed([1, 1, 1], 3, lambda size: 2 * size) == pytest.approx(1 + 6 - 3)  # the line is never idle
    assert scaling.exposed([1], 0, lambda size: 2 * size) == pytest.approx(2)


def test_predictions_of_a_project():
    cluster = Cluster(FAST, FAST)
    one, eight = (scaling.predict(STEP, cluster, cards) for cards in (1, 8))
    assert one["step_s"] == one["fsdp_step_s"] == 0.3 and one["efficiency"] == 1
    assert 0.3 < eight["step_s"] < 0.3 + eight["all_reduce_s"] and eight["efficiency"] < 1
    assert eight["memory_bytes"] == one["memory_bytes"] == one["fsdp_memory_bytes"] == 450e6
    assert eight["fsdp_memory_bytes"] == 450e6 - 400e6 * 7 / 8 + 20e6
    text = scaling.predict({**STEP, "project": "Data2vec_for_PyTorch"}, cluster, 8)
    assert text["step_s"] == pytest.approx(0.3 + text["all_reduce_s"]) and "fsdp_step_s" not in text
    clip = [scaling.predict({**STEP, "project": "CLIP_for_PyTorch"}, cluster, cards) for cards in (8, 1000)]
    plain = scaling.predict({**STEP, "project": "Beit2_for_PyTorch"}, cluster, 1000)
    assert clip[1]["step_s"] > plain["step_s"] and clip[1]["step_s"] - clip[0]["step_s"] > 0.05  # N-fold features


def test_the_command_measures_predicts_and_draws(tmp_path, capsys):
    options = ["--projects", "vit", "--size", COUNTED, "--skip_check", "--output_dir", str(tmp_path)]
    scaling.main([*options, "--step_seconds", "ViT=0.122/32"])
    content = json.loads((tmp_path / "scaling.json").read_text())
    (step,) = content["steps"]
    assert step["step_s"] == 0.122 and step["samples"] == 32
    # vit_demo of 32 pixels and two classes: weights and two moments stay, besides a batch
    parameters = step["gradient_bytes"]
    assert 0 < step["unit_bytes"] < parameters and 3 * parameters < step["state_bytes"] < 4 * parameters
    assert step["activation_bytes"] > 0
    assert [row["cards"] for row in content["predictions"]["ViT_for_PyTorch"]] == list(scaling.CARDS)
    assert (tmp_path / "scaling.png").stat().st_size > 10_000
    assert "the model was not checked: --skip_check" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        scaling.main(["--step_seconds", "ViT=fast"])
    assert "--step_seconds ViT=fast: write PROJECT=SECONDS/SAMPLES" in capsys.readouterr().err
