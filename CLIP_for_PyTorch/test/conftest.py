"""Fixtures of the CLIP tests: a COCO-layout sample made of zips, a table of pairs, tiny models."""

import csv
import json
import shutil
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from clip_sample import draw, write_coco_zips

import clip_pretraining  # noqa: F401  mends torchvision before a test module imports transformers


@pytest.fixture
def coco_zips(tmp_path) -> Path:
    folder = tmp_path / "coco zips"
    write_coco_zips(folder, {"train": 24, "val": 8})
    return folder


@pytest.fixture(scope="session")
def pairs_table(tmp_path_factory) -> Path:
    """pairs.csv of 24 pictures, one caption each, beside its pictures."""
    folder = tmp_path_factory.mktemp("table")
    with open(folder / "pairs.csv", "w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["image_path", "caption"])
        for i in range(24):
            data, caption = draw(i)
            (folder / f"{i}.jpg").write_bytes(data)
            rows.writerow([f"{i}.jpg", caption])
    return folder / "pairs.csv"


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory, pairs_table) -> Path:
    """The dual encoder of `save_clip_roberta.py --tiny`."""
    return build_tiny(tmp_path_factory.mktemp("model") / "clip-roberta", pairs_table, "dual")


@pytest.fixture(scope="session")
def tiny_clip(tmp_path_factory, pairs_table) -> Path:
    """The CLIPModel of `save_clip_roberta.py --tiny --family clip`."""
    return build_tiny(tmp_path_factory.mktemp("model") / "clip", pairs_table, "clip")


@pytest.fixture(scope="session")
def model_without_dropout(tmp_path_factory, tiny_model) -> Path:
    """The tiny dual encoder with dropout off, for runs whose random draws differ."""
    folder = tmp_path_factory.mktemp("model") / "clip-roberta"
    shutil.copytree(tiny_model, folder)
    config = json.loads((folder / "config.json").read_text())
    config["text_config"].update(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def build_tiny(folder: Path, table: Path, family: str) -> Path:
    import save_clip_roberta

    captions = table.with_suffix(".txt")
    captions.write_text("\n".join(line.split(",", 1)[1] for line in table.read_text().splitlines()[1:]))
    command = ["--tiny", "--family", family, "--captions", str(captions), "--output_dir", str(folder)]
    save_clip_roberta.main(command)
    return folder
