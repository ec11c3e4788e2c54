"""Planted faults: they reach the script they are meant for, end a demo once its numbers are there, and are judged."""

import json
import os
import subprocess
import sys

import pytest

from ci.gates.outcomes import gate, planted

STEP = {"kind": "eval", "top1": 30.0, "eval_text_to_image_R@1": 0.002}


def test_every_fault_is_of_a_script_and_falls_in_a_number_of_the_gate(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(5 * (json.dumps(STEP) + "\n"))
    said = "masked tokens predicted right: 12.50 %; their commonest token: 18.00 %"
    (tmp_path / "predictions.txt").write_text(said)
    for part, row in (("text", "teacher's probe"), ("pictures", "cloze retrieval")):
        (tmp_path / part).mkdir()
        (tmp_path / part / "probe.txt").write_text(f"on held-out {part}, %\n{row:22}{1.0:12.2f}{2.0:12.2f}\n")
    for fault in planted.FAULTS.values():
        assert (gate.ROOT / fault.project / fault.script).is_file()
        assert fault.reader(tmp_path).keys() <= gate.METRICS[fault.project].keys() and fault.reader(tmp_path)
        assert fault.reader(tmp_path / "empty") == {}
    assert planted.masked_tokens(tmp_path) == {"masked_tokens": 12.5}


@pytest.mark.parametrize("name", ["train.py", "other.py"])
def test_arguments_reach_the_named_script_alone(tmp_path, name):
    script = tmp_path / name
    script.write_text("import sys; print(sys.argv[1:])")
    planting = {"PYTHONPATH": str(planted.PLANT), "PLANTED_SCRIPT": "train.py", "PLANTED_ARGUMENTS": '["--lr", "1"]'}
    command = [sys.executable, str(script), "own"]
    said = subprocess.run(command, env=os.environ | planting, capture_output=True, text=True, check=True).stdout
    assert said.strip() == ("['own', '--lr', '1']" if name == "train.py" else "['own']")


PROBES = {
    "masks_ignored": (
        "run_beitv2_pretraining.py",
        """
import torch
from beit2.model.masked_image_model import build_pretraining_model
model = build_pretraining_model(img_size=16, patch_size=8, embed_dim=8, depth=1, num_heads=1, vocab_size=4)
seen = model(torch.ones(1, 3, 16, 16), torch.zeros(1, 4, dtype=torch.bool), return_all_tokens=True)
hidden = model(torch.ones(1, 3, 16, 16), torch.ones(1, 4, dtype=torch.bool), return_all_tokens=True)
print(torch.equal(seen, hidden))
""",
    ),
    "picture_masks_ignored": (
        "train.py",
        """
import torch
from data2vec.model.vision_model import Data2VecVision
print(Data2VecVision.forward.__name__ == "<lambda>")
""",
    ),
}


@pytest.mark.parametrize("patch", PROBES)
def test_a_patch_changes_the_model(tmp_path, patch):
    script, code = PROBES[patch]
    project = next(fault.project for fault in planted.FAULTS.values() if fault.patch == patch)
    for name in os.listdir(gate.ROOT / project):  # the script of this name, but what it does is the test's
        if not name.endswith(".py"):
            (tmp_path / name).symlink_to(gate.ROOT / project / name)
    (tmp_path / script).write_text(code)
    planting = {"PLANTED_SCRIPT": script, "PLANTED_ARGUMENTS": "[]", "PLANTED_PATCH": patch}
    environment = os.environ | planting | {"PYTHONPATH": str(planted.PLANT)}
    command = [sys.executable, script]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600)
    assert done.stdout.strip() == "True", done.stderr


def test_a_demo_ends_when_its_early_number_is_there(tmp_path, monkeypatch):
    project = tmp_path / planted.VIT / "test"
    project.mkdir(parents=True)
    lines = " ".join(5 * [f"'{json.dumps(STEP)}'"])
    (project / "demo.sh").write_text(f'printf "%s\\n" {lines} > "$2/metrics.jsonl"; sleep 600; touch "$2/whole"\n')
    monkeypatch.setattr(planted, "ROOT", tmp_path)
    monkeypatch.setattr(planted, "PATIENCE", 0.05)
    assert planted.run("learning rate / 10", 0, tmp_path, tmp_path / "run") == {"top1_early": 30.0}
    assert not (tmp_path / "run" / "whole").exists()


def test_captions_are_shuffled_and_none_is_lost(tmp_path):
    table = tmp_path / "captioned_emoji" / "train.jsonl"
    table.parent.mkdir()
    rows = [{"image_path": f"{number}.png", "caption": f"word {number}"} for number in range(20)]
    table.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with open(planted._shuffled(tmp_path, tmp_path)) as file:
        shuffled = [json.loads(line) for line in file]
    assert [row["image_path"] for row in shuffled] == [row["image_path"] for row in rows]
    captions = [row["caption"] for row in shuffled]
    assert captions != [row["caption"] for row in rows] and sorted(captions) == sorted(row["caption"] for row in rows)


@pytest.mark.parametrize(("value", "code"), [(10.0, 0), (49.0, 1), (None, 1)], ids=["falls", "stays", "no number"])
def test_the_gate_says_what_was_caught(tmp_path, monkeypatch, capsys, value, code):
    monkeypatch.setattr(gate, "sample_data", lambda: tmp_path)
    found = {} if value is None else {"top1_early": value}
    monkeypatch.setattr(planted, "run", lambda *_: found)
    assert gate.main(["--planted", "learning rate / 10", "--output_dir", str(tmp_path / "out")]) == code
    assert ("not caught: learning rate / 10" in capsys.readouterr().out) == bool(code)


def test_a_number_that_is_none_is_caught_in_the_table_too():
    rows = [("fault", "top1", value, 50.0) for value in (float("nan"), 49.0, 50.0)]
    assert [row.split("|")[5].strip() for row in planted.table(rows).splitlines()[2:]] == ["yes", "yes", "NO"]
    assert planted.caught(rows[:1]) == {"fault"} and planted.caught(rows[2:]) == set()


@pytest.mark.parametrize(
    "options",
    [["--only", planted.VIT], ["--jobs", "2"], ["--update"], ["--seeds", "0", "10"], ["--results", "."]],
    ids=lambda options: options[0],
)
def test_what_a_planted_run_would_drop_is_refused(monkeypatch, capsys, options):
    monkeypatch.setattr(gate, "try_planted", lambda *_: pytest.fail("it began"))
    with pytest.raises(SystemExit) as ended:
        gate.main(["--planted", "learning rate / 10", *options])
    assert ended.value.code == 2 and f"error: {options[0]}" in capsys.readouterr().err
