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
    assert outcomes.limit_of([49.0, 50.0, 51.0], 18.0) == pytest.approx(50 - 3)
    assert outcomes.limit_of([50.0, 50.0, 50.0], 18.0) == pytest.approx(50 - 3 * 0.02 * 50)
    assert outcomes.limit_of([1.0, 5.0, 9.0], 0.0) == pytest.approx(1.25)  # noise never hides a collapse


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


def test_update_stores_a_reference_that_then_passes(tmp_path):
    project = "ViT_for_PyTorch"
    write_runs(tmp_path / "runs", project, [{"top1": 40.0}, {"top1": 44.0}, {"top1": 42.0}])
    assert judged(tmp_path / "runs", project, "--update", "--stored", str(tmp_path / "stored")) == 0
    record = json.loads((tmp_path / "stored" / f"{project}.json").read_text())
    assert record["metrics"]["top1"] == {"values": [40.0, 44.0, 42.0], "mean": 42.0, "spread": 2.0, "limit": 36.0}


def test_a_missing_reference_is_said_before_anything_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(outcomes, "run_demo", lambda *_: pytest.fail("a demo was started"))
    with pytest.raises(outcomes.UsageError, match="ViT_for_PyTorch --update"):
        outcomes.main(["--only", "ViT_for_PyTorch", "--stored", str(tmp_path), "--output_dir", str(tmp_path / "runs")])


def test_update_without_all_runs_changes_nothing(tmp_path):
    with pytest.raises(outcomes.UsageError, match="stays as it is"):
        judged(tmp_path, PROJECTS[0], "--update", "--stored", str(tmp_path / "stored"))
    assert not (tmp_path / "stored").exists()


def test_a_real_run_that_cannot_learn_fails(tmp_path, sample_data, capsys):
    """The demo itself, on too few pictures: one step an epoch."""
    for split, count in (("train", 8), ("val", 5)):
        for folder in sorted((sample_data / "images" / split).iterdir()):
            few = tmp_path / "data" / "images" / split / folder.name
            few.mkdir(parents=True)
            for picture in sorted(folder.iterdir())[:count]:
                (few / picture.name).symlink_to(picture)
    project = "ViT_for_PyTorch"
    outcomes.run_demo(project, 0, tmp_path / "data", tmp_path / "runs" / project / "seed-0")
    log = (tmp_path / "runs" / project / "seed-0" / "demo.txt").read_text()
    assert "Final Train Accuracy" in log, log
    assert judged(tmp_path / "runs", project, "--seeds", "0") == 1
    row = capsys.readouterr().out.splitlines()[-2]
    assert row.startswith("| ViT_for_PyTorch | top1 |") and "FAIL" in row
