"""The long proof: its folders, its stages that go on, its report; the trainings themselves run for hours."""

import json
import os
import subprocess
import sys
import threading
from dataclasses import replace

import pytest
import torch
from PIL import Image

from ci.gates.outcomes.gate import ROOT
from ci.long_proof import __main__ as long_proof
from ci.long_proof import report, trainings
from ci.long_proof.pictures import prepare
from ci.long_proof.sizes import SHARES, Size, epochs_of_share
from ci.long_proof.stage import Stages
from common.errors import UsageError

FEW = Size(pictures=200, held_out=4, tokenizer=1, pretraining=1, fine_tuning=1, vit=1, clip=1)


def test_shares_of_the_labels_are_of_every_class(tmp_path):
    for split, count in (("train", 100), ("val", 3)):
        for name in ("cat", "ship"):
            (tmp_path / "source" / split / name).mkdir(parents=True)
            for number in range(count):
                Image.new("RGB", (4, 4)).save(tmp_path / "source" / split / name / f"{number:05}.png")
    prepare(tmp_path / "source", tmp_path / "data", FEW)
    for share in SHARES:
        for name in ("cat", "ship"):
            assert len(list((tmp_path / "data" / f"labels-{share}" / name).iterdir())) == share
    assert len(list((tmp_path / "data" / "val").glob("*/*"))) == 4
    rows = [json.loads(line) for line in (tmp_path / "data" / "train.jsonl").read_text().splitlines()]
    assert len(rows) == 200 and all(os.path.isfile(row["image_path"]) for row in rows)
    assert rows[0]["caption"] == "a photo of a cat."
    prepare(tmp_path / "source", tmp_path / "data", FEW)  # and again
    with pytest.raises(UsageError, match=r'data: holds .* another --size \({"pictures": 200, .*another --output_dir'):
        prepare(tmp_path / "source", tmp_path / "data", replace(FEW, pictures=100))


def test_few_labels_are_seen_more_often():
    assert [epochs_of_share(2, share) for share in (1, 10, 50, 100)] == [63, 11, 3, 2]


def test_a_stage_runs_once_anew_when_it_changes_and_names_its_log(tmp_path):
    stages, again = (Stages(tmp_path, "cpu", on_cpu=True) for _ in range(2))
    script = tmp_path / "count.py"
    script.write_text("import sys; open(sys.argv[1], 'a').write('x'); sys.exit(int(sys.argv[2]))")
    counted = tmp_path / "counted"
    seconds = stages.run("a/b", ".", [script, counted, 0])
    assert stages.run("a/b", ".", [script, counted, 0]) == seconds  # of which the next command is made
    assert counted.read_text() == "x"
    with pytest.raises(UsageError, match=r"a/b.log.*exit code 3"):
        stages.run("a/b", ".", [script, counted, 3])
    with pytest.raises(UsageError, match="exit code 3"):  # of the other chains: none begins a stage
        stages.run("c", ".", [script, counted, 0])
    again.run("a/b", ".", [script, counted, 0])
    assert counted.read_text() == "xxx"


@pytest.mark.parametrize("error", [UsageError("a.log: it says why"), KeyboardInterrupt()])
def test_the_first_error_is_raised_while_other_chains_run_and_nothing_more_begins(tmp_path, monkeypatch, error):
    running, end, begun, ended = threading.Event(), threading.Event(), [], []
    stages = Stages(tmp_path, "cpu", on_cpu=True)

    def long(*_):
        running.set()
        end.wait(600)
        try:
            stages.run("next", ".", ["-c", "pass"])
        except BaseException as found:
            ended.append(found)
        return {}

    def fails(*_):
        assert running.wait(600)
        stages.failed.append(error)  # as a stage does
        raise error

    def later(*_):
        stages.run("later", ".", ["-c", "pass"])
        begun.append("later")

    monkeypatch.setattr(long_proof, "CHAINS", (long, fails, later))
    before = set(threading.enumerate())
    with pytest.raises(type(error)) as raised:
        long_proof.run_chains(stages, tmp_path, FEW, 2)
    assert raised.value is error and not end.is_set()
    end.set()
    for thread in set(threading.enumerate()) - before:
        thread.join(600)
    assert ended == [error] and begun == [] and not (tmp_path / "next").exists()


def test_chains_are_reported_in_their_order(tmp_path, monkeypatch):
    second = threading.Event()

    def slow(*_):
        assert second.wait(600)
        return {"slow": {1: 2.0}}

    def quick(*_):
        second.set()
        return {"quick": {1: 3.0}}

    monkeypatch.setattr(long_proof, "CHAINS", (slow, quick))
    found = long_proof.run_chains(Stages(tmp_path, "cpu", on_cpu=True), tmp_path, FEW, 2)
    assert list(found) == ["slow", "quick"]


def test_data2vec_s_encoder_is_one_for_beit2(tmp_path):
    """Under BEiT's names, all tensors of the encoder fit."""
    write = (
        "import sys, torch; from data2vec.model.vision_model import Data2VecVision, VisionConfig;"
        "from data2vec.model.targets import TargetConfig;"
        "c = VisionConfig(image_size=32, patch_size=4, embed_dim=96, depth=4, num_heads=4);"
        "torch.save({'model': Data2VecVision(c, TargetConfig(average_top_k_layers=3)).state_dict()}, sys.argv[1])"
    )
    file = tmp_path / "checkpoint.pt"
    subprocess.run([sys.executable, "-c", write, str(file)], cwd=ROOT / trainings.DATA2VEC, check=True)
    renamed = trainings.beit_names(file)
    torch.save({"model": renamed}, tmp_path / "encoder.pth")
    read = (
        "import sys; from beit2.model.names import create_model; from beit2.weights.encoder_file import read_encoder;"
        "model = create_model('beit_nano_patch8_48_8k_vocab_cls_pt', img_size=32, patch_size=4);"
        "state = read_encoder(sys.argv[1]).state;"
        "print([n for n, t in state.items() if model.state_dict()[n].shape != t.shape], len(state))"
    )
    command = [sys.executable, "-c", read, str(tmp_path / "encoder.pth")]
    said = subprocess.run(command, cwd=ROOT / trainings.BEIT2, check=True, capture_output=True, text=True).stdout
    assert said.split() == ["[]", str(len(renamed))] and len(renamed) > 40


def test_the_report_says_whether_the_goal_is_reached(tmp_path):
    rows = {"BEiT v2": 60.0, "data2vec": 50.0, "the same from scratch": 55.0}
    found = {method: dict.fromkeys(SHARES, value) for method, value in rows.items()} | {"CLIP, zero-shot": {100: 70.0}}
    assert "reached (BEiT v2 60.0, from scratch 55.0)" in report.goal(found)
    assert "NOT reached" in report.goal(found | {"BEiT v2": dict.fromkeys(SHARES, 54.0)})
    assert report.table(found).splitlines()[-1] == "| CLIP, zero-shot |  |  |  | 70.0 |"
    report.draw(found, tmp_path / "accuracy.png")
    assert Image.open(tmp_path / "accuracy.png").size[0] > 400
