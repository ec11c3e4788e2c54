"""Fixtures of the CLIP tests."""

import sys
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[1]
for folder in (str(PROJECT), str(PROJECT.parent)):
    if folder not in sys.path:
        sys.path.insert(0, folder)

import clip_pretraining  # noqa: E402, F401  mends torchvision before a test module imports transformers
