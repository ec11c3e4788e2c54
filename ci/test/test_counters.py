"""Step counters: the same on every run, and each planted fault is named in the difference."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch

from ci.gates.counters import gate as counters
from ci.gates.counters.operation_counter import OperationCounter

ROOT = Path(__file__).resolve().parents[2]
PROJECT = "ViT_for_PyTorch"
RUNS = ["fp32, 2 ranks", "bf16"]


def test_counter_sees_operations_reads_shapes_and_memory():
    values = torch.arange(8.0)
    counter = OperationCounter()
    with counter:
        kept = values * 2  # 32 bytes
        kept = kept + 1  # 32 more; the first are freed then
        half = kept.bfloat16()  # 16
        positive = values[values > 3]  # a mask of 8 bytes, 16 of the result
        by_index = values[torch.tensor([1, 2])]
        read = float(half.sum()), kept.tolist()
    assert counter.operations["mul.Tensor float32"] == 1 and counter.operations["_to_copy bfloat16"] == 1
    assert list(counter.host_reads) == [
        "_local_scalar_dense at test/test_counters.py:test_counter_sees_operations_reads_shapes_and_memory",
        "tolist at test/test_counters.py:test_counter_sees_operations_reads_shapes_and_memory",
    ]
    assert list(counter.dynamic_shapes) == [
        "index.Tensor at test/test_counters.py:test_counter_sees_operations_reads_shapes_and_memory"
    ]
    assert counter.allocated_bytes >= 32 + 32 + 16 + 8 + 16 + 8
    live = sum(tensor.nbytes for tensor in (kept, half, positive, by_index))
    assert counter.live_bytes == live and live < counter.peak_bytes < counter.allocated_bytes
    assert read[0] == half.float().sum()


@pytest.fixture(scope="module")
def counted() -> counters.Report:
    return counters.count_project(PROJECT, runs=RUNS)


def test_no_change_no_difference(counted, tmp_path, capsys):
    totals = counted["bf16"]["totals"]
    assert totals["optimizer tensors"] == 3 * totals["parameter tensors"] and totals["optimizer steps"] == 1
    assert totals["peak live bytes"] >= 4 * totals["parameters"]  # the gradients live at once
    assert counted["fp32, 2 ranks"]["totals"]["collective bytes"] > 4 * totals["parameters"]
    problem = counters.check(PROJECT, counted, tmp_path)
    assert "no accepted counts" in problem and "--accept --project ViT_for_PyTorch" in problem
    path = counters.accept(PROJECT, counted, tmp_path)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"torch 1.0": {}}))
    again = counters.count_project(PROJECT, runs=RUNS)  # another process
    assert counters.check(PROJECT, again, tmp_path) is None


def test_planted_faults_are_named(counted, tmp_path):
    """An extra wait for the device, a block that falls back to fp32, an extra all-reduce: in a copy of the project."""
    tree = tmp_path / "tree"
    for folder in ("common", PROJECT):
        shutil.copytree(ROOT / folder, tree / folder, ignore=shutil.ignore_patterns("golden", "output", "__pycache__"))
    engine = tree / PROJECT / "vit" / "engine.py"
    text = engine.read_text()
    planted = text.replace("mean_loss += loss.detach()", "mean_loss += loss.item()")
    planted = planted.replace("all_reduce_mean(loss)", "all_reduce_mean(all_reduce_mean(loss))")
    model = tree / PROJECT / "vit" / "cpu_patches.py"
    slow = model.read_text().replace("self.mlp(self.norm2(kept))", "_in_fp32(self.mlp, self.norm2(kept))")
    slow += "\n\ndef _in_fp32(module, x):\n    with torch.autocast('cpu', enabled=False):\n        return module(x)\n"
    assert planted.count("loss.item()") == 1 and planted.count("all_reduce_mean(all_reduce_mean(") == 1
    assert "_in_fp32(self.mlp" in slow
    engine.write_text(planted)
    model.write_text(slow)

    counters.accept(PROJECT, counted, tmp_path)
    problem = counters.check(PROJECT, counters.count_project(PROJECT, tree, RUNS), tmp_path)
    changed = {tuple(line.split()[:-1]) for line in problem.splitlines()}
    words = [" ".join(row) for row in changed]
    assert any("bf16 host reads: _local_scalar_dense at vit/engine.py:forward_backward - 1" in row for row in words)
    linear = counted["bf16"]["operations"]["addmm bfloat16"]
    assert any(f"operations: addmm bfloat16 {linear} {linear - 8}" in row for row in words)  # two a block, four blocks
    head = counted["bf16"]["operations"]["addmm float32"]  # which is in fp32 anyway
    assert any(f"operations: addmm float32 {head} {head + 8}" in row for row in words)
    assert any("fp32, 2 ranks collectives " in row for row in words)
    assert "--accept --project ViT_for_PyTorch" in problem


def test_a_lost_no_sync_a_doubled_rate_and_a_doubled_average_are_named(tmp_path):
    """In a copy of the project, beside the accepted counts of the code as it is."""
    runs = ["fp32, 2 ranks, accumulation", "fp32, ema"]
    tree = tmp_path / "tree"
    for folder in ("common", PROJECT):
        shutil.copytree(ROOT / folder, tree / folder, ignore=shutil.ignore_patterns("golden", "output", "__pycache__"))
    engine = tree / PROJECT / "vit" / "engine.py"
    text = engine.read_text()
    planted = text.replace("gradients_stay_local(run.trained, micro + 1 < config.accumulate)", "nullcontext()")
    planted = planted.replace("set_learning_rate(run.optimizer, lr)", "set_learning_rate(run.optimizer, 2 * lr)")
    planted = planted.replace("import torch\n", "from contextlib import nullcontext\nimport torch\n", 1)
    assert planted.count("nullcontext") == 2 and "2 * lr)" in planted
    engine.write_text(planted)
    preparation = tree / PROJECT / "vit" / "preparation.py"
    text = preparation.read_text()
    assert text.count("lambda: ema.update(model)") == 1
    preparation.write_text(text.replace("lambda: ema.update(model)", "lambda: [ema.update(model), ema.update(model)]"))

    accepted = json.loads((counters.BASELINES / f"{PROJECT}.json").read_text())[counters.torch_version()]
    accepted = {run: accepted[run] for run in runs}
    rows = counters.differences(accepted, counters.count_project(PROJECT, tree, runs))
    changed = {(run, what): (old, new) for run, what, old, new in rows}
    old, new = changed[runs[0], "collectives"]
    assert new > old, "the gradients travel in every micro-step"
    assert any(what.startswith("rates of the last step") for run, what in changed if run == runs[1])
    lerp = changed[runs[1], "operations: _foreach_lerp_.Scalar float32"]
    assert lerp == (1, 2), "the average moves twice"


def test_every_operator_has_a_row():
    """ci/npu/fake/README.md says of every operator of a steady step what torch_npu does otherwise, if anything."""
    operators = set()
    for path in counters.BASELINES.glob("*.json"):
        for runs in json.loads(path.read_text()).values():
            for run in runs.values():
                operators |= {name.split()[0].split(".")[0] for name in run.get("operations", ())}
    page = (ROOT / "ci" / "npu" / "fake" / "README.md").read_text()
    table = page[page.index("## Where torch_npu differs from torch") :]
    named = set()
    for line in table.splitlines():
        if line.startswith("| "):
            named |= set(re.findall(r"`(\w+)`", line.split(" | ")[0]))
    assert operators - named == set(), "operators without a row"
    assert f"for the {len(operators)} operators" in table
