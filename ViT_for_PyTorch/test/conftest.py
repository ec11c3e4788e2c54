"""Importing the package repairs torchvision, which the tests import too; the pictures of whole runs."""

import sys
from pathlib import Path

import pytest

import vit  # noqa: F401

sys.path.insert(0, str(Path(__file__).parent))  # test_run_vit.py


@pytest.fixture(scope="session")
def pictures(sample_data, tmp_path_factory) -> Path:
    """Three classes of the sample pictures: 8 each to train, 5, 4 and 4 to evaluate."""
    root = tmp_path_factory.mktemp("my pictures")
    for split, count in (("train", 8), ("val", 4)):
        for index, name in enumerate(("flags", "food_and_drink", "symbols")):
            folder = root / split / name
            folder.mkdir(parents=True)
            extra = int(split == "val" and index == 0)
            for picture in sorted((sample_data / "images" / split / name).iterdir())[: count + extra]:
                (folder / picture.name).symlink_to(picture)
    return root
