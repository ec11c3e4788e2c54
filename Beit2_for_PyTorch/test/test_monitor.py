"""--monitor_every: scores of the frozen encoder while it is pretrained, without a change of the training."""

import json
import os
import re
import signal

import numpy as np
import pytest
import torch
from small_models import OPTIONS

import beit2
import run_beitv2_pretraining
from beit2.training.frozen_scores import knn_top1, linear_top1
from beit2.weights.files import read_checkpoint
from common.errors import PREEMPTED, UsageError
from common.run import preemption

MEASURED = ("fps", "data_ms", "cpu_s", "memory_mib", "mfu")  # of the machine, and not of the training


def run(pictures, tokenizer_file, output_dir, *extra):
    return run_beitv2_pretraining.main([
        *OPTIONS, "--model", "beit_test_cls_pt", "--data_path", str(pictures / "train"), "--tokenizer_weight",
        str(tokenizer_file), "--epochs", "2", "--drop_path", "0.2", "--output_dir", str(output_dir), *extra,
    ])  # fmt: skip


def lines(folder, kind):
    found = [json.loads(text) for text in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in MEASURED} for line in found if line["kind"] == kind]


def test_the_training_is_the_same_with_and_without(pictures, tokenizer_file, tmp_path):
    run(pictures, tokenizer_file, tmp_path / "without")
    result = run(pictures, tokenizer_file, tmp_path / "with", "--monitor_every", "1")
    assert lines(tmp_path / "with", "train") == lines(tmp_path / "without", "train")
    a, b = (read_checkpoint(tmp_path / name / "checkpoint.pth")["model"] for name in ("with", "without"))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert (tmp_path / "with/log.txt").read_text() == (tmp_path / "without/log.txt").read_text()
    scores = lines(tmp_path / "with", "monitor")
    assert [line["step"] for line in scores] == [0, 4, 8] and not lines(tmp_path / "without", "monitor")
    for line in scores:  # one hue a class, which the features of any encoder tell
        assert (line["knn_top1"], line["linear_top1"], line["guessing_top1"]) == (100, 100, 50)
    assert (result["knn_top1"], result["linear_top1"]) == (100, 100)
    again = run(pictures, tokenizer_file, tmp_path / "with", "--monitor_every", "1")  # when it is finished
    assert (again["knn_top1"], again["linear_top1"]) == (100, 100)


def test_a_monitor_that_is_interrupted_is_made_up_for(pictures, tokenizer_file, tmp_path, monkeypatch):
    whole = ("--monitor_every", "2", "--monitor_data_path", str(pictures))
    run(pictures, tokenizer_file, tmp_path / "whole", *whole)
    real, calls = preemption.Watch.agreed, []

    def agreed(watch):
        calls.append(1)
        if len(calls) == 9:  # after eight steps: the monitor's first batch
            os.kill(os.getpid(), signal.SIGTERM)
        return real(watch)

    with monkeypatch.context() as patch:
        patch.setattr(preemption.Watch, "agreed", agreed)
        with pytest.raises(SystemExit) as stopped:
            run(pictures, tokenizer_file, tmp_path / "cut", *whole)
    assert stopped.value.code == PREEMPTED and not lines(tmp_path / "cut", "monitor")[1:]
    run(pictures, tokenizer_file, tmp_path / "cut", *whole)
    assert lines(tmp_path / "cut", "monitor") == lines(tmp_path / "whole", "monitor")
    assert (tmp_path / "cut/log.txt").read_text() == (tmp_path / "whole/log.txt").read_text()


def test_scores_are_those_of_other_programs():
    """Overlapping clouds: what scikit-learn's logistic regression and its neighbours by angle get right."""
    sklearn = pytest.importorskip("sklearn")
    from sklearn.linear_model import LogisticRegression
    from sklearn.neighbors import KNeighborsClassifier
    from sklearn.preprocessing import StandardScaler

    assert sklearn
    generator = torch.Generator().manual_seed(0)
    labels, truth = (torch.arange(count) % 5 for count in (200, 300))
    centres = torch.randn(5, 12, generator=generator)
    train, test = (centres[k] + 1.3 * torch.randn(len(k), 12, generator=generator) for k in (labels, truth))
    scaler = StandardScaler().fit(train)
    theirs = LogisticRegression(max_iter=1000).fit(scaler.transform(train), labels)
    expected = 100 * theirs.score(scaler.transform(test), truth)
    assert linear_top1(train, labels, test, truth) == pytest.approx(expected, abs=0.7) and 50 < expected < 95
    votes = KNeighborsClassifier(20, metric="cosine", weights=lambda distances: np.exp(-distances / 0.07))
    expected = 100 * votes.fit(train, labels).score(test, truth)
    assert knn_top1(train, labels, test, truth) == pytest.approx(expected, abs=0.4) and 50 < expected < 95


@torch.no_grad()
def test_encode_is_the_forward_pass_with_nothing_masked():
    model = beit2.create_model("beit_test_cls_pt", img_size=32, vocab_size=32, early_layers=2, head_layers=1).eval()
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(model.encode(images)[:, 1:], model(images, return_patch_tokens=True)[0])


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--monitor_every", "-1"], "--monitor_every -1: must not be negative"),
        (["--monitor_every", "1", "--monitor_data_path", "nowhere"], "nowhere has no train/ and val/"),
        (["--monitor_data_path", "{}/odd"], "odd: needs --monitor_every; give both"),
        (["--log_dir", "{}/file"], "--log_dir .*/file: cannot be written .File exists.; name another folder"),
        (["--monitor_every", "1", "--data_path", "{}/train/red"], "red has no train/ and val/.*--monitor_data_path"),
        (["--monitor_every", "1", "--monitor_data_path", "{}/odd"], "class folder green does not exist"),
        (["--monitor_every", "1", "--monitor_data_path", "{}/one"], "one/train: a single class"),
    ],
)  # fmt: skip
def test_what_cannot_be_monitored(pictures, tokenizer_file, tmp_path, extra, message):
    (tmp_path / "file").touch()
    for name, classes in (("odd", ("red", "blue", "green")), ("one", ("red", "red"))):
        for split, chosen in (("train", classes[:2]), ("val", classes[1:])):
            for each in set(chosen):
                (tmp_path / name / split / each).mkdir(parents=True)
                (tmp_path / name / split / each / "0.jpg").write_bytes((pictures / "val/red/0.jpg").read_bytes())
    extra = [word.format(pictures if "red" in word else tmp_path) for word in extra]
    with pytest.raises(UsageError) as caught:
        run(pictures, tokenizer_file, tmp_path / "out", *extra)
    assert re.search(message, caught.value.message), caught.value.message
    assert not (tmp_path / "out/metrics.jsonl").exists()
