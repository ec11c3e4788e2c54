"""Comparing losses: every log format, each mode's verdict, and faults in the fourth digit and below."""

import json
import math
import random
import subprocess

import pytest

from ci.gates import revisions
from ci.gates.losses import gate as loss_compare
from ci.gates.losses import loss_files
from ci.gates.paired.verdict import FAIL, INCONCLUSIVE, PASS
from common.errors import UsageError


def curve(steps=300, seed=0, bias=0.0, noise=0.004, every=10):
    """A falling loss with its own noise, of which `bias` is a relative part from the middle on."""
    draw = random.Random(seed)
    return {
        step: (2 + 5 * math.exp(-step / 800)) * (1 + draw.gauss(0, noise) + bias * (step > every * steps / 2))
        for step in range(every, every * (steps + 1), every)
    }


def write_run(folder, losses, **extra):
    folder.mkdir(parents=True)
    lines = [{"kind": "train", "step": s, "epoch": s / 100, "loss": v, "lr": 1e-3, **extra} for s, v in losses.items()]
    lines.insert(1, {"kind": "eval", "step": 10, "loss": 99.0})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"kind": "tra')
    return str(folder)


def run(*arguments, capsys):
    code = loss_compare.main(list(map(str, arguments)))
    return code, capsys.readouterr().out


def test_every_format_gives_the_same_curve(tmp_path):
    losses = {10: 2.5, 20: 2.25, 30: 2.125}
    expected = loss_files.read(write_run(tmp_path / "ours", losses, grad_norm=3.0))
    assert expected.losses == losses and set(expected.others) == {"grad_norm", "lr"} and expected.spacing == 10
    stamp = "[2023-04-11 12:00:00,000]"
    values = [{"epoch": 1, "loss": f"{v}", "num_updates": f"{s}", "gnorm": "3.0"} for s, v in losses.items()]
    inner = [f"{stamp}[train_inner][INFO] - {json.dumps(line)}" for line in values]
    valid = f'{stamp}[valid][INFO] - {{"epoch": 1, "valid_loss": "9", "valid_num_updates": "30"}}'
    history = [{"step": s, "loss": v, "epoch": 0.1, "grad_norm": 3.0} for s, v in losses.items()]
    history += [{"step": 30, "eval_loss": 9.0}, {"step": 30, "train_loss": 2.3, "train_runtime": 5.0}]
    files = {
        "train.log": "\n".join(
            ["some text", *inner, valid, f'{stamp}[train][INFO] - {{"train_loss": "2", "epoch": 1}}']
        ),
        "bare.json": "\n".join(json.dumps(line) for line in values),
        "trainer_state.json": json.dumps({"log_history": history}, indent=1),
        "published.csv": "\ufeffWall time,Step,Value\n" + "".join(f"0,{s},{v}\n" for s, v in losses.items()),
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text)
        assert loss_files.read(tmp_path / name).losses == losses, name
    (tmp_path / "log.txt").write_text('{"train_loss": 2.5, "train_lr": 0.1, "epoch": 0}\n')
    by_epoch = loss_files.read(tmp_path / "log.txt")
    assert by_epoch.losses == {0: 2.5} and by_epoch.unit == "epoch"
    with pytest.raises(UsageError, match="counts steps and log epochs"):
        loss_compare.measure(expected, by_epoch, "cross-device", 0.02, [])


def test_refactor_and_resume_ask_for_equality(tmp_path, capsys):
    losses = curve()
    whole = write_run(tmp_path / "whole", losses, grad_norm=1.5)
    same = write_run(tmp_path / "same", losses, grad_norm=1.5)
    assert run(whole, same, capsys=capsys)[0] == 0
    late = write_run(tmp_path / "late", {s: v for s, v in losses.items() if s > 1000}, grad_norm=1.5)
    assert run(whole, late, "--mode", "resume", capsys=capsys)[0] == 0
    code, text = run(whole, late, capsys=capsys)
    assert code == 1 and "only one of them has: 10, 20" in text

    changed = dict(losses)
    changed[1500] *= 1 + 1e-4  # the fourth digit
    code, text = run(whole, write_run(tmp_path / "changed", changed, grad_norm=1.5), capsys=capsys)
    assert code == 1 and "loss: 1 steps differ, the first is 1500: " in text and "step 1500" in text
    changed[1500] = math.nextafter(losses[1500], 9)  # the last bit
    code, text = run(whole, write_run(tmp_path / "bit", changed, grad_norm=1.5), "--mode", "resume", capsys=capsys)
    assert code == 1 and "the first is 1500" in text
    code, text = run(whole, write_run(tmp_path / "norm", losses, grad_norm=1.5001), capsys=capsys)
    assert code == 1 and "grad_norm: 300 steps differ, the first is 10: 1.5 against 1.5001" in text


def test_cross_device_wants_a_small_gap_and_no_bias(tmp_path, capsys):
    a = write_run(tmp_path / "gpu", curve(seed=0))
    seeds = [
        write_run(tmp_path / f"seed{i}", curve(seed=i, bias=0.003 * i)) for i in (1, 2, 3)
    ]  # seeds differ by 0.9 %
    mode = ["--mode", "cross-device"]
    near = write_run(tmp_path / "near", curve(seed=9))
    code, text = run(a, near, *mode, "--plot", tmp_path / "near.png", capsys=capsys)
    assert code == 0 and "none to speak of" in text and (tmp_path / "near.png").stat().st_size > 20_000
    biased = write_run(tmp_path / "biased", curve(seed=9, bias=0.015))  # below 2 % in the mean, and wrong
    code, text = run(a, biased, *mode, "--seeds", *seeds, capsys=capsys)
    assert code == 1 and "biased: last third +1.5" in text
    code, text = run(a, biased, *mode, capsys=capsys)
    assert code == 3 and "give --seeds" in text
    within = write_run(tmp_path / "within", curve(seed=9, bias=0.005))
    code, text = run(a, within, *mode, "--seeds", *seeds, capsys=capsys)
    assert code == 0 and "within the seeds'" in text
    code, text = run(a, write_run(tmp_path / "far", curve(seed=9, bias=0.08)), *mode, capsys=capsys)
    assert code == 1 and "2% is the limit" in text and "diverging from       step 1510" in text
    broken = curve() | {2000: math.nan}
    code, text = run(a, write_run(tmp_path / "nan", broken), *mode, capsys=capsys)
    assert code == 1 and "not finite, first at 2000" in text
    with pytest.raises(UsageError, match="no meaning"):
        loss_compare.main([a, near, "--seeds", *seeds])


def test_a_finer_log_is_averaged_over_the_coarser_one_s_lines():
    fine = loss_files.Curve("fine", {step: float(step) for step in range(1, 121)}, {})
    coarse = loss_files.Curve("coarse", {step: step - 4.5 for step in range(10, 121, 10)}, {})
    steps, a, b = loss_files.on_common_steps(fine, coarse)
    assert steps == list(range(10, 121, 10)) and a == b == list(coarse.losses.values())
    gap = loss_compare.measure(coarse, fine, "cross-device", 0.02, [])
    assert loss_compare.judge(gap, "cross-device", 0.02)[0] == PASS
    assert {PASS, FAIL, INCONCLUSIVE} == set(loss_compare.EXIT_CODES)


def test_too_few_lines_a_short_run_and_a_curve_that_leaves_and_comes_back_are_no_pass():
    whole = {step: 5.0 for step in range(1, 301)}
    for other, word in (
        ({step: 5.0 for step in range(1, 6)}, "5 lines in common are too few"),
        ({step: 5.0 for step in range(1, 101)}, "B ends at 100, A at 300"),
        (whole | {step: 7.5 for step in range(120, 130)}, "apart by 16.7% between 120 and 149"),
    ):
        curves = loss_files.Curve("a", whole, {}), loss_files.Curve("b", other, {})
        verdict, reason = loss_compare.judge(
            loss_compare.measure(*curves, "cross-device", 0.02, []), "cross-device", 0.02
        )
        assert verdict == INCONCLUSIVE and word in reason, reason


def test_two_revisions_are_trained_and_compared(tmp_path, capsys, monkeypatch):
    """A copy of the repo's data2vec with a commit that changes the loss in its fourth digit."""
    repo = tmp_path / "repo"
    repo.mkdir()
    for folder in ("common", "Data2vec_for_PyTorch"):
        subprocess.run(["cp", "-r", revisions.ROOT / folder, repo / folder], check=True)
    git = ["git", "-C", repo, "-c", "user.name=a", "-c", "user.email=a@b"]
    commit = [*git, "commit", "--quiet", "--all", "--message"]
    subprocess.run([*git, "init", "--quiet", "--initial-branch=main"], check=True)
    subprocess.run([*git, "add", "--all"], check=True)
    subprocess.run([*commit, "one"], check=True)
    source = repo / "Data2vec_for_PyTorch" / "data2vec" / "training" / "update.py"
    text = source.read_text()
    assert "out = run.forward(model, batch)" in text
    (repo / "README.md").write_text("another commit, no other training")
    subprocess.run([*git, "add", "--all"], check=True)
    subprocess.run([*commit, "two"], check=True)
    planted = 'out = run.forward(model, batch)\n        out["loss_sum"] = out["loss_sum"] * 1.0001'
    source.write_text(text.replace("out = run.forward(model, batch)", planted, 1))
    subprocess.run([*commit, "three"], check=True)
    monkeypatch.setattr(revisions, "ROOT", repo)
    train, trained = loss_compare.train_revision, {}

    def train_once(revision, *rest):
        trained[revision] = trained.get(revision) or train(revision, *rest)
        return trained[revision]

    monkeypatch.setattr(loss_compare, "train_revision", train_once)  # both comparisons have the one in the middle
    arguments = ["--project", "data2vec", "--steps", "3"]
    code, out = run("HEAD~2", "HEAD~1", *arguments, capsys=capsys)
    assert code == 0 and "PASS: identical over 3 lines" in out
    code, out = run("HEAD~1", "HEAD", *arguments, "--plot", tmp_path / "gap.png", capsys=capsys)
    assert code == 1 and "loss: 3 steps differ, the first is 1" in out and "+0.0100" in out
    assert (tmp_path / "gap_Data2vec_for_PyTorch.png").exists()


def test_what_cannot_be_compared_is_said(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.log").write_text("nothing here\n")
    a = write_run(tmp_path / "a", {1: 2.0})
    later = write_run(tmp_path / "later", {7: 2.0})
    for arguments, message in (
        (["no-such-thing", a], "neither a file or folder nor a git revision"),
        (["HEAD", a], "two logs or two revisions"),
        ([str(tmp_path / "empty"), a], "no metrics.jsonl"),
        ([str(tmp_path / "text.log"), a], "no losses in it"),
        ([a, later], "no step in common"),
        ([a, a, "--limit", "0"], "--limit"),
    ):
        with pytest.raises(UsageError, match=message):
            loss_compare.main(arguments)
