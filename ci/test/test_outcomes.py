"""Outcome runs: a collapsed metric fails, no change passes, and a real run that cannot learn is caught."""

import json
import shutil

import pytest

from ci.gates.outcomes import gate as outcomes

PROJECTS = sorted(path.stem for path in outcomes.STORED.glob("*.json"))  # whose reference has been measured


def test_there_are_references_and_all_are_known():
    assert PROJECTS and set(PROJECTS) <= set(outcomes.METRICS)


def write_runs(folder, project, numbers, status=0):
    """Finished runs of the three seeds with these numbers, one dict a seed."""
    for seed, found in zip(outcomes.SEEDS, numbers, strict=True):
        run = folder / project / f"seed-{seed}"
        run.mkdir(parents=True)
        (run / "demo.json").write_text(json.dumps(found))
        (run / "run.json").write_text(json.dumps({"exit": status, "seconds": 1}))


def stored_numbers(project):
    """What the reference's seeds measured, as their demos wrote it."""
    metrics = outcomes.load_stored(project, outcomes.STORED)["metrics"]
    columns = [metrics[name]["values"] for name in outcomes.METRICS[project]]
    return [dict(zip(outcomes.METRICS[project], values, strict=True)) for values in zip(*columns, strict=True)]


def judged(folder, project, *more):
    return outcomes.main(["--results", str(folder), "--only", project, *more])


@pytest.mark.parametrize("project", PROJECTS)
def test_no_change_passes(tmp_path, project, capsys):
    write_runs(tmp_path, project, stored_numbers(project))
    assert judged(tmp_path, project) == 0
    assert capsys.readouterr().out.count("| pass |") == len(outcomes.METRICS[project])


@pytest.mark.parametrize("project", PROJECTS)
def test_a_collapsed_metric_fails_alone(tmp_path, project, capsys):
    for number, (metric, nothing) in enumerate(outcomes.METRICS[project].items()):
        folder = tmp_path / str(number)
        write_runs(folder, project, [found | {metric: nothing} for found in stored_numbers(project)])
        assert judged(folder, project) == 1
        rows = capsys.readouterr().out.splitlines()
        assert [row.split("|")[2].strip() for row in rows if "| FAIL" in row] == [metric]


@pytest.mark.parametrize("project", PROJECTS)
def test_the_band_is_one_sided(tmp_path, project):
    better = [{name: 2 * abs(value) for name, value in found.items()} for found in stored_numbers(project)]
    write_runs(tmp_path, project, better)
    assert judged(tmp_path, project) == 0


def test_the_limit_follows_spread_and_what_was_learned():
    assert outcomes.limit_of([79.0, 80.0, 81.0], 60.0) == pytest.approx(80 - 3 * 0.02 * 80)
    assert outcomes.limit_of([70.0, 70.0, 70.0], 60.0) == pytest.approx(67.5), "a quarter of the gap"
    assert outcomes.limit_of([61.0, 65.0, 69.0], 60.0) == pytest.approx(63.75), "noise never hides a loss"


@pytest.mark.parametrize("project", PROJECTS)
def test_losing_a_third_of_the_gap_fails(tmp_path, project):
    """Of the gap between yardstick and stored mean, in every metric."""
    stored = outcomes.load_stored(project, outcomes.STORED)["metrics"]
    lost = {name: (stored[name]["mean"] - yardstick) / 3 for name, yardstick in outcomes.METRICS[project].items()}
    assert all(gap > 0 for gap in lost.values())
    worse = [{name: value - lost[name] for name, value in found.items()} for found in stored_numbers(project)]
    write_runs(tmp_path, project, worse)
    assert judged(tmp_path, project) == 1


def test_a_run_that_failed_or_is_missing_fails(tmp_path, capsys):
    project = PROJECTS[0]
    write_runs(tmp_path / "failed", project, stored_numbers(project), status=3)
    (tmp_path / "failed" / project / "seed-0" / "demo.json").unlink()
    assert judged(tmp_path / "failed", project) == 1
    assert "seed 0 ended with exit code 3" in capsys.readouterr().out
    write_runs(tmp_path / "missing", project, stored_numbers(project))
    shutil.rmtree(tmp_path / "missing" / project / "seed-10")
    assert judged(tmp_path / "missing", project) == 1
    assert "seed 10 did not run" in capsys.readouterr().out


@pytest.mark.parametrize("content", ['{"top1": 6', "", "[]"])
@pytest.mark.parametrize("name", ["demo.json", "run.json"])
def test_a_result_cut_short_is_named(tmp_path, capsys, name, content):
    write_runs(tmp_path, PROJECTS[0], stored_numbers(PROJECTS[0]))
    broken = tmp_path / PROJECTS[0] / "seed-10" / name
    broken.write_text(content)
    with pytest.raises(SystemExit) as ended:
        judged(tmp_path, PROJECTS[0])
    assert ended.value.code == 2 and capsys.readouterr().err.startswith(f"error: {broken}: ")


@pytest.mark.parametrize("option", ["--jobs=1", "--output_dir=out"])
def test_what_judging_has_no_use_for_is_refused(tmp_path, capsys, option):
    with pytest.raises(SystemExit) as ended:
        outcomes.main(["--results", str(tmp_path), option])
    assert ended.value.code == 2 and f"{option.split('=')[0]}: has no meaning with --results" in capsys.readouterr().err


def test_update_stores_a_reference_that_then_passes(tmp_path):
    project = "ViT_for_PyTorch"
    runs = [dict.fromkeys(outcomes.METRICS[project], value) for value in (70.0, 74.0, 72.0)]
    write_runs(tmp_path / "runs", project, runs)
    assert judged(tmp_path / "runs", project, "--update", "--stored", str(tmp_path / "stored")) == 0
    record = json.loads((tmp_path / "stored" / f"{project}.json").read_text())
    limit = outcomes.limit_of([70.0, 74.0, 72.0], outcomes.METRICS[project]["top1"])
    assert record["metrics"]["top1"] == {"values": [70.0, 74.0, 72.0], "mean": 72.0, "spread": 2.0, "limit": limit}


def test_a_missing_reference_is_said_before_anything_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(outcomes, "run_demo", lambda *_: pytest.fail("a demo was started"))
    with pytest.raises(outcomes.UsageError, match="ViT_for_PyTorch --update"):
        outcomes.main(["--only", "ViT_for_PyTorch", "--stored", str(tmp_path), "--output_dir", str(tmp_path / "runs")])


def test_update_without_all_runs_changes_nothing(tmp_path):
    with pytest.raises(outcomes.UsageError, match="stays as it is"):
        judged(tmp_path, PROJECTS[0], "--update", "--stored", str(tmp_path / "stored"))
    assert not (tmp_path / "stored").exists()


def test_a_variant_of_a_demo_in_the_environment_is_not_judged(tmp_path, monkeypatch):
    """CAPTIONS=zh make outcomes: the demo that is run, and held against its limits, is the usual one."""
    script = tmp_path / "CLIP_for_PyTorch" / "test" / "demo.sh"
    script.parent.mkdir(parents=True)
    script.write_text('echo "captions ${CAPTIONS-unset}, tokenizer ${RANDOM_TOKENIZER-unset}"\n')
    monkeypatch.setattr(outcomes, "ROOT", tmp_path)
    for name, value in (("CAPTIONS", "zh"), ("RANDOM_TOKENIZER", "1")):
        monkeypatch.setenv(name, value)
    outcomes.run_demo("CLIP_for_PyTorch", 0, tmp_path, tmp_path / "run")
    assert (tmp_path / "run" / "demo.txt").read_text() == "captions unset, tokenizer unset\n"


def test_a_real_run_that_cannot_learn_fails(tmp_path, sample_data, capsys):
    """The demo itself, on too few pictures: one step an epoch."""
    for split, count in (("images/train", 8), ("images/val", 5), ("images_openmoji/val", 5)):
        for folder in sorted((sample_data / split).iterdir()):
            few = tmp_path / "data" / split / folder.name
            few.mkdir(parents=True)
            for picture in sorted(folder.iterdir())[:count]:
                (few / picture.name).symlink_to(picture)
    project = "ViT_for_PyTorch"
    outcomes.run_demo(project, 0, tmp_path / "data", tmp_path / "runs" / project / "seed-0")
    log = (tmp_path / "runs" / project / "seed-0" / "demo.txt").read_text()
    assert "Final Train Accuracy" in log, log
    assert judged(tmp_path / "runs", project, "--seeds", "0") == 1
    assert "error: top-1, held-out emoji families" in log and "does not beat 60" not in log, "a yardstick of its own"
    row = next(row for row in capsys.readouterr().out.splitlines() if row.startswith("| ViT_for_PyTorch | top1 |"))
    assert "FAIL" in row
