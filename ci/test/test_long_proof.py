"""The long proof: its folders, its stages that go on, its report; the trainings themselves run for hours."""

import json
import os
import subprocess
import sys

import pytest
import torch
from PIL import Image

from ci.gates.outcomes.gate import ROOT
from ci.long_proof import report, trainings
from ci.long_proof.pictures import prepare
from ci.long_proof.sizes import SHARES, SIZES, Size
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


def test_few_labels_are_seen_more_often():
    assert [SIZES["cpu"].epochs_of_share(share) for share in (1, 100)] == [10, 1]


def test_a_stage_runs_once_anew_when_it_changes_and_names_its_log(tmp_path):
    stages = Stages(tmp_path, "cpu", on_cpu=True)
    script = tmp_path / "count.py"
    script.write_text("import sys; open(sys.argv[1], 'a').write('x'); sys.exit(int(sys.argv[2]))")
    counted = tmp_path / "counted"
    seconds = stages.run("a/b", ".", [script, counted, 0])
    assert stages.run("a/b", ".", [script, counted, 0]) == pytest.approx(seconds, abs=0.1)
    assert counted.read_text() == "x"
    with pytest.raises(UsageError, match=r"a/b/log.txt.*exit code 3"):
        stages.run("a/b", ".", [script, counted, 3])
    stages.run("a/b", ".", [script, counted, 0])
    assert counted.read_text() == "xxx"


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
