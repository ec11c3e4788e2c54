"""Every file in examples/ runs, on models of random weights and data of a few lines."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from ci.training_cases import CASES, COUNTED, ROOT, run_script

ENTRIES = {"classify": "ViT", "visual_tokens": "Beit2", "search_pictures": "CLIP", "text_features": "Data2vec"}
ENTRIES["read_corpus"] = "Data2vec"


def example(name: str, *words: object) -> str:
    """Standard output of an example, started as examples/README.md says."""
    environment = os.environ | {"PYTHONPATH": str(ROOT / f"{ENTRIES[name]}_for_PyTorch"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, ROOT / "examples" / f"{name}.py", *map(str, words)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def trained(project: str, folder: Path, *more: str) -> Path:
    """Output folder of two steps of a project's small case."""
    case, data, output = CASES[project], folder / "data", folder / "out"
    data.mkdir()
    case.prepare(data, COUNTED)
    command = case.command(data, COUNTED, output, "cpu", "fp32", "--max_steps", "2", *more)
    run_script(project, f"{case.entry}.py", *command)
    return output


@pytest.fixture
def picture(tmp_path) -> Path:
    path = tmp_path / "red.png"
    Image.new("RGB", (64, 48), "red").save(path)
    return path


def test_every_example_is_tested_and_named_in_the_readme():
    names = {path.stem for path in (ROOT / "examples").glob("*.py")}
    text = (ROOT / "examples" / "README.md").read_text()
    assert names == set(ENTRIES) and all(f"examples/{name}.py" in text for name in names)


def test_classify(tmp_path, picture):
    output = trained("ViT_for_PyTorch", tmp_path)
    assert "class" in example("classify", output, picture, picture)


def test_visual_tokens(tmp_path, picture):
    from beit2 import create_tokenizer

    name = "vqkd_encoder_tiny_decoder_1x192x3_dino"
    torch.save({"model": create_tokenizer(name).state_dict()}, tmp_path / "tokenizer.pth")
    assert example("visual_tokens", tmp_path / "tokenizer.pth", picture, name).count("\n") == 14


def test_search_pictures(tmp_path, picture):
    (tmp_path / "captions.txt").write_text("a red car\na blue house\n" * 20)
    words = ["--tiny", "--captions", tmp_path / "captions.txt", "--output_dir", tmp_path / "model"]
    run_script("CLIP_for_PyTorch", "save_clip_roberta.py", *words)
    assert str(picture) in example("search_pictures", tmp_path / "model", "a red car", picture)


def test_text_features_and_corpus(tmp_path):
    output = trained("Data2vec_for_PyTorch", tmp_path, "checkpoint.no_save=false")
    corpus = tmp_path / "data" / "corpus"
    assert "sentences" in example("read_corpus", corpus)
    assert "1." in example("text_features", next((output / "checkpoints").glob("*.pt")), corpus)
