"""Goldens of the reference (see README.md in golden/) and tiny fixtures."""

import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import beit2  # repairs torchvision before anything else imports it

sys.path.insert(0, str(Path(__file__).parent))
import small_models  # noqa: F401  registers the small models

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    torch.set_num_threads(1)


def drawn_weight(name: str, draw: torch.Tensor) -> torch.Tensor:
    """A standard normal draw at the scale that the goldens' models have for a parameter of this name."""
    if "gamma" in name:
        return 0.3 + 0.1 * draw
    if "table" in name:
        return 0.5 * draw
    if "norm" in name and name.endswith("weight"):
        return 1 + 0.1 * draw
    if name.endswith("weight"):
        return 1.2 / math.sqrt(draw[0].numel()) * draw
    return 0.1 * draw


def redraw(spec: list[dict]) -> dict[str, torch.Tensor]:
    """The tensors that a golden has as seeds. Each entry is a generator's seed and what is drawn from it, in order:
    `weights` (a model's parameters), `randn` and `rand`, {name: shape}; all of it `repeat` times, stacked."""
    tensors = {}
    for entry in spec:
        generator = torch.Generator().manual_seed(entry["seed"])
        for name, shape in entry.get("weights", {}).items():
            tensors[f"sd.{name}"] = drawn_weight(name, torch.randn(shape, generator=generator))
        draws = [(kind, name, shape) for kind in ("randn", "rand") for name, shape in entry.get(kind, {}).items()]
        rounds = [
            [getattr(torch, kind)(shape, generator=generator) for kind, _, shape in draws]
            for _ in range(entry.get("repeat", 1))
        ]
        for (_, name, _), parts in zip(draws, zip(*rounds, strict=True), strict=True):
            tensors[name] = torch.stack(parts) if "repeat" in entry else parts[0]
    return tensors


class Golden:
    """A golden's scalars (`json`) and tensors (by key), stored or drawn from the reference's seeds."""

    def __init__(self, name: str):
        self.json = json.loads((GOLDEN / f"{name}.json").read_text()) if (GOLDEN / f"{name}.json").exists() else {}
        tensors = GOLDEN / f"{name}.safetensors"
        self.tensors = load_file(tensors) if tensors.exists() else {}
        self.tensors |= redraw(self.json.get("drawn", []))

    def __getitem__(self, key: str) -> torch.Tensor:
        return self.tensors[key]

    def state(self, prefix: str = "sd.") -> dict[str, torch.Tensor]:
        return {k[len(prefix) :]: v for k, v in self.tensors.items() if k.startswith(prefix)}


@pytest.fixture
def golden():
    return Golden


@pytest.fixture
def golden_arrays():
    return lambda name: np.load(GOLDEN / f"{name}.npz")


@pytest.fixture(scope="session")
def pictures(tmp_path_factory) -> Path:
    """An image folder of two classes with 8 pictures each in train/ and 4 in val/, one hue a class."""
    root = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for split, count in (("train", 8), ("val", 4)):
        for number, name in enumerate(("red", "blue")):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 90, (48, 64, 3), dtype=np.uint8)
                pixels[..., 2 * number] += 150
                Image.fromarray(pixels).save(folder / f"{i}.png" if i % 2 else folder / f"{i}.jpg")
    return root


@pytest.fixture(scope="session")
def tokenizer_file(tmp_path_factory) -> Path:
    """Weights of a random tokenizer that fits `small_models.OPTIONS`."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.pth"
    tokenizer = beit2.create_tokenizer("vqkd_test_clip", img_size=32, n_code=32, code_dim=8, decoder_out_dim=16)
    torch.save({"model": tokenizer.state_dict()}, path)
    return path
