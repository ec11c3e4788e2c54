"""What the tests of whole runs share: how one is started, and what it leaves."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from common import checkpoint_file

TEST = Path(__file__).parent


def words(configs: Path, name: str, data: Path, output: Path, *more: str) -> list[str]:
    """The arguments of an entry script's `main`, on the CPU."""
    base = ["--config-dir", str(configs), "--config-name", name, f"task.data={data}"]
    return [*base, "--output_dir", str(output), "--device", "cpu", *more]


def last(folder: Path) -> dict:
    return checkpoint_file.load(folder / "checkpoints" / "checkpoint_last.pt")


def lines(folder: Path, *kinds: str) -> list[dict]:
    """Of metrics.jsonl."""
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in found if line["kind"] in kinds]


def assert_same(a, b, where: str = "") -> None:
    """Bit for bit, of the same types."""
    assert type(a) is type(b), where
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_same(a[key], b[key], f"{where}/{key}")
    else:
        assert a == b, where
