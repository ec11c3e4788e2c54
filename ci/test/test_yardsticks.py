"""The yardsticks on pictures whose answer is known, and the end of a demo: table, demo.json, exit code."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ci.yardsticks import pixels, report, words
from ci.yardsticks.report import Line, Promise, conclude

COLOURS = {"red": (200, 0, 0), "green": (0, 200, 0), "blue": (0, 0, 200)}


def write_classes(folder: Path, counts: dict[str, int], brightness: int) -> Path:
    for name, count in counts.items():
        (folder / name).mkdir(parents=True)
        for i in range(count):
            colour = tuple(min(255, value + brightness + i) for value in COLOURS[name])
            Image.new("RGB", (24, 24), colour).save(folder / name / f"{i}.png")
    return folder


def test_nearest_class_finds_colours_and_guessing_is_the_largest_class(tmp_path):
    train = write_classes(tmp_path / "train", {"red": 3, "green": 2, "blue": 2}, 0)
    val = write_classes(tmp_path / "val", {"red": 1, "green": 3, "blue": 1}, 20)
    assert pixels.nearest_class(train, val) == {"guessing": pytest.approx(60), "nearest_pixels": 100}
    (val / "red" / "0.png").rename(val / "blue" / "red.png")
    assert pixels.nearest_class(train, val)["nearest_pixels"] == pytest.approx(80)


@pytest.mark.parametrize(
    "captions",
    [
        {"red": "a red box", "green": "a green box", "blue": "a blue box"},
        {"red": "红色的盒子", "green": "绿色的盒子", "blue": "蓝色的盒子"},  # without spaces
    ],
)
def test_words_of_nearest_retrieve_what_pixels_tell(tmp_path, captions):
    for split, shift in (("train", 0), ("val", 20)):
        write_classes(tmp_path / split, dict.fromkeys(COLOURS, 1), shift)
        rows = [{"image_path": f"{split}/{name}/0.png", "caption": captions[name]} for name in COLOURS]
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = words.retrieval(tmp_path / "train.jsonl", tmp_path / "val.jsonl")
    assert found["words_of_nearest"]["text_to_image_R@1"] == found["words_of_nearest"]["image_to_text_R@1"] == 100
    assert found["guessing"]["text_to_image_R@1"] == pytest.approx(100 / 3)


def test_ties_give_what_guessing_gives():
    owner = np.arange(100).repeat(2)
    found = words.recalls(np.zeros((100, 200)), owner)
    assert found["text_to_image_R@10"] == found["image_to_text_R@10"] == 0
    scores = np.zeros((100, 200))
    scores[owner, np.arange(200)] = 1
    assert set(words.recalls(scores, owner).values()) == {100}


def test_a_demo_fails_below_any_yardstick_and_says_so(tmp_path, capsys):
    good = Line("top1", "top-1", 66.0, {"guessing": 18.0, "nearest pixels": 60.2})
    shown = Line("new", "unseen concept", 20.0, {"guessing": 2.7, "nearest pixels": 30.6}, binding=False)
    promise = Promise({"top1": 64.0}, 400)
    assert conclude([good, shown], tmp_path / "demo.json", promise, 350.0, to_goal=210.0) == 0
    said = capsys.readouterr().out
    assert "| unseen concept * |" in said and "promise top1 >= 64: kept" in said and "error" not in said
    content = json.loads((tmp_path / "demo.json").read_text())
    assert content["top1"] == 66.0 and content["beside"]["top1"]["nearest pixels"] == 60.2
    assert content["to_goal"] == 210.0 and all(content["promises_kept"].values())
    bad = Line("top1", "top-1", 60.2, good.beside)
    assert conclude([bad, shown], tmp_path / "demo.json", promise, 450.0) == 1
    said = capsys.readouterr().out
    assert "top-1: 60.2 does not beat 60.2" in said and "promise 400 CPU seconds: NOT KEPT" in said
    assert json.loads((tmp_path / "demo.json").read_text())["top1"] == 60.2
    assert conclude([Line("top1", "top-1", float("nan"), good.beside)], tmp_path / "demo.json", promise, 1) == 1


def test_promises_are_read_from_a_configs_head(tmp_path):
    config = tmp_path / "demo.yaml"
    config.write_text("# A model.\n# Promises: top1 >= 64, objects >= 60.5 within 480 CPU seconds\nmodel:\n")
    assert report.promises(config) == Promise({"top1": 64.0, "objects": 60.5}, 480.0)
    config.write_text("model:\n")
    with pytest.raises(ValueError, match="no line '# Promises"):
        report.promises(config)


def test_time_to_quality_is_the_first_evaluation_above(tmp_path):
    log = tmp_path / "metrics.jsonl"
    rows = [{"kind": "eval", "top1": v, "cpu_s": s} for v, s in ((50, 10.0), (61, 20.0), (60, 30.0), (65, 40.0))]
    log.write_text("".join(json.dumps(row) + "\n" for row in [{"kind": "train", "loss": 1.0}, *rows]))
    evaluations = report.read_evaluations(log)
    (tmp_path / "times.txt").write_text("0m0.5s 0m0.250s\n2m3.000s 0m1.250s\n")
    assert report.cpu_seconds_of(tmp_path / "times.txt") == 125.0
    assert [report.cpu_seconds_to(evaluations, "top1", least) for least in (60.2, 64, 70)] == [20.0, 40.0, None]
