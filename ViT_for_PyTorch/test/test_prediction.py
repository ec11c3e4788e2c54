"""Prediction as users run it: odd files answered for, ranks and workers sharing the work, agreement with evaluation."""

import http.server
import json
import os
import subprocess
import sys
import threading
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import run_vit
import vit
from common.errors import UsageError
from common.run import result_file

PROJECT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A small model with three classes by name, saved as a folder."""
    torch.manual_seed(0)
    model = vit.create_model("vit_demo", 3, img_size=24)
    torch.nn.init.normal_(model.head.weight)
    return vit.save_pretrained(model, tmp_path_factory.mktemp("model") / "m", ["ant", "bee", "cat"])


@pytest.fixture
def pictures(tmp_path) -> Path:
    folder = tmp_path / "my pictures"
    for index in range(5):
        path = folder / ("ant", "bee", "cat")[index % 3] / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(index).integers(0, 256, (30, 26, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
    return folder


def arguments(model: Path, output: Path, *more: str) -> list[str]:
    return [
        "--device",
        "cpu",
        "--num_workers",
        "0",
        "--load_checkpoint",
        str(model),
        "--output_dir",
        str(output),
        *more,
    ]


def test_broken_pictures_are_reported_and_the_rest_is_answered(model, pictures, tmp_path, capsys):
    (pictures / "ant" / "broken.jpg").write_bytes(b"\xff\xd8 no picture")
    os.rename(os.fsencode(pictures / "bee" / "1.png"), os.fsencode(pictures) + b"/bee/\xff.png")
    run_vit.main(["--run_mode", "predict", "--predict_data", str(pictures), *arguments(model, tmp_path / "out")])
    printed = capsys.readouterr()
    found = json.loads((tmp_path / "out" / "predictions.json").read_text())
    assert len(found) == 5 and str(pictures / "bee" / r"\xff.png") in found
    assert all({entry["label"] for entry in labels} == {"ant", "bee", "cat"} for labels in found.values())
    unreadable = json.loads((tmp_path / "out" / "unreadable.json").read_text())
    assert list(unreadable) == [str(pictures / "ant" / "broken.jpg")] and "broken.jpg: not a readable" in printed.err
    assert "5 pictures and 1 unreadable" in printed.out and " FPS" in printed.out
    with Image.open(tmp_path / "out" / "predictions.png") as grid:
        assert min(grid.size) > 200


def test_a_picture_by_its_url_and_a_file(model, pictures, tmp_path, monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    handler = partial(http.server.SimpleHTTPRequestHandler, directory=pictures)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        given = [f"http://127.0.0.1:{server.server_port}/bee/1.png", str(pictures / "bee" / "1.png")]
        run_vit.main(["--run_mode", "predict", "--predict_data", *given, *arguments(model, tmp_path / "out")])
        server.shutdown()
    found = json.loads((tmp_path / "out" / "predictions.json").read_text())
    assert list(found) == given and found[given[0]] == found[given[1]]


def test_nothing_readable_is_an_error(model, tmp_path):
    (tmp_path / "x.jpg").write_bytes(b"")
    with pytest.raises(UsageError, match="none of 1 pictures can be read: .*x.jpg"):
        run_vit.main(["--run_mode", "predict", "--predict_data", str(tmp_path), *arguments(model, tmp_path / "out")])


def test_pipeline_prediction_and_evaluation_agree_on_any_number_of_ranks(model, pictures, tmp_path):
    """The same weights and pictures: the same scores to the last digit, the same hits."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += [str(PROJECT / "run_vit.py"), "--run_mode", "predict", "--predict_data", str(pictures)]
    command += [*arguments(model, tmp_path / "two"), "--num_workers", "1", "--predict_batch_size", "1"]
    process = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert process.returncode == 0, process.stderr
    found = json.loads((tmp_path / "two" / "predictions.json").read_text())
    one = {path: vit.pipeline(model=model, device="cpu")(path)[0] for path in found}
    assert found == one and list(found) == sorted(found)

    run_vit.main(["--run_mode", "eval", "--eval_dataset_dir", str(pictures), *arguments(model, tmp_path / "eval")])
    result = result_file.read(next((tmp_path / "eval").glob("*.log")))
    hits = sum(labels[0]["label"] == Path(path).parent.name for path, labels in found.items())
    assert (int(result["Top1"]), int(result["Count"])) == (hits, 5)
