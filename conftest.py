"""Fixtures and import paths that the tests of every project share."""

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent
PROJECTS = ("ViT_for_PyTorch", "Beit2_for_PyTorch", "CLIP_for_PyTorch", "Data2vec_for_PyTorch")
for folder in (ROOT, *(ROOT / project for project in PROJECTS)):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))


@pytest.fixture(scope="session")
def sample_data() -> Path:
    """Folder with the small real data sets `images/`, `coco2017/` and `text/`; built on the first run (needs network).

    The build holds a file lock, so several pytest processes may ask for it at once.
    """
    from ci.sample_data.build import DEFAULT_OUTPUT, build

    return build(DEFAULT_OUTPUT)
