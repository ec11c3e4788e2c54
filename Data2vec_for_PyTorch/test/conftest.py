"""Fixtures: the goldens written by fairseq (commit 3f6ba43f), and small models and corpora made from them."""

import json
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

GOLDEN = Path(__file__).parent / "golden"
sys.path.insert(0, str(Path(__file__).parent))  # small_runs.py


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def project() -> Path:
    """The project's folder, whose entry scripts can be imported (/conftest.py)."""
    return Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def train_main(project):
    """`main` of train.py."""
    import train

    return train.main


@pytest.fixture
def tiny(tmp_path, project) -> Path:
    """Folder with tiny.yaml alone, to which a test may add."""
    folder = tmp_path / "configs"
    folder.mkdir()
    shutil.copy(project / "test" / "tiny.yaml", folder)
    return folder


@pytest.fixture(scope="session")
def pictures(sample_data, tmp_path_factory) -> Path:
    """Class folders with a few of the sample pictures, linked: 21 to train on, 9 to validate."""
    root = tmp_path_factory.mktemp("pictures")
    for split, count in (("train", 7), ("val", 3)):
        for name in ("flags", "objects", "symbols"):
            (root / split / name).mkdir(parents=True)
            for file in sorted((sample_data / "images" / split / name).iterdir())[:count]:
                os.symlink(file, root / split / name / file.name)
    return root


@pytest.fixture(scope="session")
def golden() -> Path:
    return GOLDEN


@pytest.fixture(scope="session")
def model_info() -> dict:
    return json.loads((GOLDEN / "model_info.json").read_text())


@pytest.fixture
def corpus(tmp_path) -> Path:
    """A writable copy of the binarized golden corpus."""
    folder = tmp_path / "corpus"
    shutil.copytree(GOLDEN / "bin", folder)
    return folder


@pytest.fixture(scope="session")
def train_sizes() -> np.ndarray:
    return np.array(json.loads((GOLDEN / "batching.json").read_text())["sizes"])


@pytest.fixture(scope="session")
def bpe(project, tmp_path_factory):
    """Folder with encoder.json, vocab.bpe and dict.txt, made from the training table."""
    import bpe_encode
    import preprocess

    folder = tmp_path_factory.mktemp("bpe")
    (folder / "text").write_text((GOLDEN / "questions" / "train.csv").read_text())
    files = ["--encoder-json", f"{folder}/encoder.json", "--vocab-bpe", f"{folder}/vocab.bpe"]
    bpe_encode.main(["--learn", "400", *files, "--inputs", f"{folder}/text", "--outputs", f"{folder}/text.bpe"])
    preprocess.main(["--only-source", "--trainpref", f"{folder}/text.bpe", "--destdir", f"{folder}/bin"])
    shutil.copy(folder / "bin/dict.txt", folder)
    return folder


@pytest.fixture(scope="session")
def other_dict(bpe, tmp_path_factory) -> Path:
    """bpe's dict.txt with its second word moved to the end: the same length, other ids."""
    first, second, *others = (bpe / "dict.txt").read_text().splitlines()
    path = tmp_path_factory.mktemp("other") / "dict.txt"
    path.write_text("\n".join([first, *others, second]) + "\n")
    return path
