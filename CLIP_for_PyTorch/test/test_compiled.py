"""--torch_compile: one graph without breaks, whatever the captions' length, and the losses of eager."""

import csv
from pathlib import Path

import pytest
import torch
from clip_sample import draw
from safetensors.torch import load_file
from test_run_clip import losses, run, train_options
from torch._dynamo.utils import counters


@pytest.fixture
def long_and_short(tmp_path) -> Path:
    """Captions of 7 to 60 tokens, and a last batch of an epoch that is smaller."""
    with open(tmp_path / "pairs.csv", "w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["image_path", "caption"])
        for number in range(21):
            data, caption = draw(number)
            (tmp_path / f"{number}.jpg").write_bytes(data)
            rows.writerow([f"{number}.jpg", " ".join([caption] * (1 + number // 4))])
    return tmp_path / "pairs.csv"


@pytest.fixture
def compiler(monkeypatch):
    """Dynamo with nothing compiled yet, and no word of it in the environment afterwards."""
    for name in ("ACCELERATE_DYNAMO_BACKEND", "ACCELERATE_DYNAMO_MODE"):
        monkeypatch.setenv(name, "no")
        monkeypatch.delenv(name)
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("family, backend", [("model_without_dropout", "eager"), ("tiny_clip", "aot_eager")])
def test_losses_are_those_of_eager_in_few_graphs(family, backend, long_and_short, tmp_path, request, compiler):
    model = request.getfixturevalue(family)
    options = train_options(long_and_short, "--batch_size", "4", "--max_steps", "6", "--save_every", "3")
    run(tmp_path / "eager", model, *options)
    compiled = [*options, "--torch_compile", "True", "--torch_compile_backend", backend]
    run(tmp_path / "compiled", model, *compiled)
    assert not counters["graph_break"] and 1 <= counters["stats"]["unique_graphs"] <= 4
    assert losses(tmp_path / "compiled") == pytest.approx(losses(tmp_path / "eager"), rel=1e-5)
    stored = load_file(tmp_path / "compiled/model.safetensors")
    assert stored.keys() == load_file(tmp_path / "eager/model.safetensors").keys()

    if family != "tiny_clip":
        return  # one resume is enough: it compiles everything again
    run(tmp_path / "resumed", model, *compiled, "--resume", str(tmp_path / "compiled/checkpoint-3"))
    assert losses(tmp_path / "resumed") == losses(tmp_path / "compiled")[3:]
