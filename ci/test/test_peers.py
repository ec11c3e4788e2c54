"""The benchmarks against peers: all are in the one command, both sides compute the same, README and results agree."""

import importlib
import json
import math
import subprocess
import sys

import pytest
import torch

from ci.npu import fake as fake_npu
from ci.peers import ROOT, device_step, table
from ci.peers.steps.step import PROJECTS, sides_of
from common.errors import UsageError

peers = importlib.import_module("ci.peers.__main__")
CPU = torch.device("cpu")


def test_the_one_command_runs_every_benchmark():
    benchmarks = {p.stem for p in (ROOT / "ci/peers").glob("*.py") if "write_result(" in p.read_text()}
    benchmarks -= {"paired_timing"}
    assert {benchmark.module for benchmark in peers.CPU_BENCHMARKS} == benchmarks | {"device_step"}


def test_the_options_of_every_benchmark_are_its_own():
    for benchmark in peers.CPU_BENCHMARKS:
        source = (ROOT / "ci/peers" / f"{benchmark.module}.py").read_text()
        for option in (word for word in benchmark.options if word.startswith("--")):
            assert f'"{option}"' in source, f"{benchmark.name}: {benchmark.module} has no {option}"


def test_choosing_benchmarks():
    names = [benchmark.name for benchmark in peers.chosen(peers.CPU_BENCHMARKS, ["data2vec_step", "vit_input"])]
    assert names == ["vit_input", "data2vec_step_fp32", "data2vec_step_bf16"]
    with pytest.raises(UsageError, match="vit_stepp.*there are vit_step,"):
        peers.chosen(peers.CPU_BENCHMARKS, ["vit_stepp"])


def test_a_benchmark_that_fails_is_named_and_the_others_run(monkeypatch, capfd):
    broken = [peers.Benchmark(f"broken{i}", "no_such_benchmark") for i in range(2)]
    monkeypatch.setattr(peers, "CPU_BENCHMARKS", tuple(broken))
    assert peers.main(["--quick"]) == 1
    output = capfd.readouterr()
    assert "== broken1: exit 1" in output.out and "failed: broken0, broken1" in output.err


@pytest.mark.parametrize("project", PROJECTS)
def test_both_sides_of_a_step_compute_the_same(project):
    """Losses of three steps; ViT's peers draw their own mixing, so there only the first loss, ln(classes), is alike."""
    module = sides_of(project)
    steps = {}
    for name, build in module.SIDES.items():
        if name != "open_clip":
            steps[name] = build("tiny", CPU, "fp32", False)
    losses = {name: [float(step.run()) for _ in range(3)] for name, step in steps.items()}
    ours = losses.pop("ours")
    for name, values in losses.items():
        if project == "vit":
            assert values[0] == pytest.approx(math.log(10), abs=0.2) and all(map(math.isfinite, values))
        else:
            assert values == pytest.approx(ours, rel=1e-4), name
    assert len({(step.samples, step.unit) for step in steps.values()}) == 1


def test_what_cannot_be_measured_is_said():
    with pytest.raises(UsageError, match="no tiny model|requirements-dev.txt"):
        sides_of("clip").SIDES["open_clip"]("tiny", CPU, "fp32", False)
    with pytest.raises(UsageError, match="without torch.compile"):
        sides_of("data2vec").SIDES["plain"]("tiny", CPU, "fp32", True)


def test_device_step_measures_a_small_step(tmp_path):
    options = "--device cpu --size tiny --only data2vec --precision fp32 --compile off --rounds 2 --steps 2 --warmup 1"
    device_step.main([*options.split(), "--output_dir", str(tmp_path)])
    result = json.loads((tmp_path / "device_step_data2vec_fp32.json").read_text())
    assert result["clock"] == "CPU seconds at one thread" and result["matmul_peak_tflop_per_second"] > 0
    [versus] = result["versus"].values()
    for side in (versus["ours"], versus["peer"]):
        assert side["tokens_per_second"] * side["seconds_a_step"] == pytest.approx(128)
        assert 0 < side["share_of_matmul_peak"] < 1 and side["peak_memory_mib"] > 50 and side["tflop_a_step"] > 0
        assert side["mfu"] is None and side["host_waits_a_step"] is None  # no data sheet, nothing to wait for
    [row] = table.comparisons("device_step_data2vec_fp32", result)
    assert row.peer == "plain, torch.compile off" and row.low <= row.median <= row.high
    assert row.memory == (versus["ours"]["peak_memory_mib"], versus["peer"]["peak_memory_mib"])


@pytest.mark.skipif(fake_npu.why_missing() is not None, reason=str(fake_npu.why_missing()))
def test_the_command_for_a_card_on_the_simulated_npu(tmp_path):
    """What cannot be compiled is said."""
    command = [sys.executable, "-m", "ci.peers", "--device", "npu", "--size", "tiny", "--only", "beit2_bf16", "--quick"]
    command += ["--output_dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=fake_npu.environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((tmp_path / "device_step_beit2_bf16.json").read_text())
    eager, compiled = (result["versus"][f"plain, torch.compile {mode}"] for mode in ("off", "on"))
    assert (
        eager["ours"]["images_per_second"] > 0
        and eager["ours"]["host_waits_a_step"] == 0 < eager["peer"]["host_waits_a_step"]
    )
    assert eager["ours"]["mfu"] > 0 and result["mfu_peak"].endswith("measured here)")
    assert "torch.compile on npu" in compiled["not_measured"]
    assert len(list(table.comparisons("device_step_beit2", result))) == 1


def test_a_card_s_command_ends_in_time(monkeypatch, capfd):
    """Each benchmark has its share of what is left; one that hangs is ended and named."""
    monkeypatch.setattr(peers, "GRACE_S", 0.2)
    started = []

    def sleep(command, timeout, **more):
        started.append(float(command[command.index("--seconds") + 1]))
        raise subprocess.TimeoutExpired(command, timeout)

    monkeypatch.setattr(peers.subprocess, "run", sleep)
    assert peers.main(["--device", "cuda", "--minutes", "4", "--only", "vit", "clip", "--output_dir", "x"]) == 1
    assert started == [60, 80, 120, 240]  # of those before nothing was used
    assert "failed: vit_bf16, clip_bf16, vit_fp32, clip_fp32" in capfd.readouterr().err


def test_folder_of_a_device(monkeypatch):
    assert device_step.folder_name(CPU) == "cpu"
    monkeypatch.setattr(device_step.devices, "describe", lambda device: "NVIDIA H100 80GB HBM3")
    assert device_step.folder_name(torch.device("cuda")) == "nvidia-h100-80gb-hbm3"


@pytest.mark.parametrize(
    ("result", "peer", "share", "memory"),
    [
        ({"ratio": 2.0, "ratio_low": 1.5, "ratio_high": 2.5}, "plain reference", None, None),
        ({"versus": {"timm": {"median": 2.0, "low": 1.5, "high": 2.5, "our_gemm_peak_share": 0.8}}}, "timm", 0.8, None),
        (
            {
                "peer": "open_clip",
                "peer_over_ours": {"median": 2.0, "range": [1.5, 2.5]},
                "share_of_gemm_peak": {"ours": 0.5},
            },
            "open_clip",
            0.5,
            None,
        ),
        (
            {"plain_over_ours": {"median": 2.0, "low": 1.5, "high": 2.5}, "peak_memory_mib_ours_plain": [10, 20]},
            "plain",
            None,
            (10, 20),
        ),
    ],
)
def test_the_table_reads_every_form_of_result(result, peer, share, memory):
    [row] = table.comparisons("x_step", result)
    assert (row.peer, row.median, row.low, row.high, row.share, row.memory) == (peer, 2.0, 1.5, 2.5, share, memory)


def test_every_result_kept_is_in_a_table():
    kept = {path.stem for path in table.BASELINES.glob("*/*.json") if table.RESULTS.match(path.name)}
    assert kept == {row.benchmark for row in table.all_comparisons()}
    shown = set(table.MARKED.findall(table.SHOWN_IN[0].read_text(encoding="utf-8")))
    assert shown == {"peers", *(path.stem.removeprefix("table_") for path in table.BASELINES.glob("*/table_*.json"))}


def test_documents_show_the_results_that_are_kept():
    for path in table.SHOWN_IN:
        text = path.read_text(encoding="utf-8")
        assert table.with_tables(text) == text, f"{path} is out of date: python -m ci.peers --table"


def test_only_the_parts_between_the_markers_change(tmp_path):
    text = "before\n<!-- a:begin -->\nold\n<!-- a:end -->\nbetween\n<!-- b:begin -->\n<!-- b:end -->\nafter\n"
    expected = text.replace("old\n", "new a\n").replace("b:begin -->\n", "b:begin -->\nnew b\n")
    assert table.with_tables(text, lambda name: f"new {name}\n") == expected
    assert table.with_tables("no markers") == "no markers"
    result = {"columns": ["x", "s (range)"], "rows": [["a", "1 (0 to 2)"]], "cpu": "X", "threads": 1, "torch": "2"}
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu" / "table_a.json").write_text(json.dumps(result))
    assert (
        table.table_of("a", tmp_path)
        == "| x | s (range) |\n| --- | --- |\n| a | 1 (0 to 2) |\n\nX, 1 thread, torch 2.\n"
    )
