"""The nightly speed run: a real script once, and verdicts over nights of a stub one."""

import json

import pytest

from ci.gates import machine
from ci.gates.nightly import gate as perf_run
from ci.gates.nightly import series as perf_series
from ci.gates.nightly.series import FASTER, NEW, SAME, SLOWER
from ci.training_cases import write_pictures
from common.errors import UsageError

STUB = """#!/usr/bin/env bash
set -e
for flag in "$@"; do [[ $flag == --output_dir=* ]] && output=${flag#*=}; done
mkdir -p "$output"
read -r fps < "$(dirname "${BASH_SOURCE[0]}")/fps"
[[ $fps != crash ]] || { echo "error: planted" >&2; exit 7; }
cat > "$output/Stub_bs4_1p_perf.log" <<END
CaseName = Stub_bs4_1p_perf
RankSize = 1
BatchSize = 4
ActualFPS = $fps
StepTimeMs = 12.5
PeakMemoryMiB = 300
Status = OK
END
"""


def nights(*speeds):
    return [{"date": "2026-01-01", "commit": "a" * 40, "fps": speed} for speed in speeds]


def test_a_night_is_judged_by_the_median_and_the_spread_of_those_before():
    quiet = nights(100, 101, 99, 100, 100.5)
    assert [perf_series.judge(fps, quiet).verdict for fps in (100, 96, 94, 90, 104, 106)] == [
        SAME, SAME, SLOWER, SLOWER, SAME, FASTER,
    ]  # fmt: skip
    noisy = nights(100, 80, 120, 90, 110)  # 1.48 x 10 x 3 = 44 %
    assert perf_series.judge(60, noisy).verdict == SAME and perf_series.judge(50, noisy).verdict == SLOWER
    assert perf_series.judge(50, nights(100, 100)).verdict == NEW  # too few to say
    moved = nights(*[50] * 10, *[100] * 10)  # only the last ten count
    assert perf_series.judge(90, moved).verdict == SLOWER


@pytest.fixture
def stub(tmp_path, monkeypatch):
    """night(fps, *options) -> (exit code, verdict) of a repo whose ViT script says that speed."""
    root = tmp_path / "repo"
    folder = root / "ViT_for_PyTorch" / "test"
    folder.mkdir(parents=True)
    (folder / "train_performance_1p.sh").write_text(STUB)
    (tmp_path / "pictures").mkdir()
    monkeypatch.setattr(perf_run, "ROOT", root)
    places = ["--baselines", str(tmp_path / "baselines"), "--reports", str(tmp_path / "reports")]
    command = ["--device", "cpu", "--project", "vit", "--data", f"ViT={tmp_path / 'pictures'}", *places]

    def night(fps, *options):
        (folder / "fps").write_text(f"{fps}\n")
        code = perf_run.main([*command, *options])
        return code, json.loads((tmp_path / "reports" / "results.json").read_text())[0]["verdict"]

    return night


def test_nights_of_one_device_and_a_slow_one(stub, tmp_path, monkeypatch, capsys):
    for fps in (100, 102, 99):
        assert stub(fps, "--update") == (0, NEW)
    assert stub(101) == (0, SAME)
    assert stub(120) == (0, FASTER)  # a gain never fails
    assert stub(90) == (3, SLOWER)  # a CPU's wall clock is no gate
    assert "-10.0%" in capsys.readouterr().out
    path = tmp_path / "baselines" / "cpu" / "Stub_bs4_1p_perf.json"
    (series,) = json.loads(path.read_text())
    assert [night["fps"] for night in series["nights"]] == [100, 102, 99]  # without --update nothing is written
    assert {"device", "driver", "cann", "torch", "batch", "precision", "ranks", "settings"} <= set(series["key"])
    summary = (tmp_path / "reports" / "summary.md").read_text()
    assert "| ViT_for_PyTorch | 1     | 90.00" in summary and "100.00 (3)" in summary

    assert stub(90, "--precision", "bf16") == (0, NEW)  # another key, another series
    real = machine.environment("cpu")
    monkeypatch.setattr(machine, "environment", lambda device: real | {"driver": "26.0"})
    assert stub(90, "--update") == (0, NEW)
    assert len(json.loads(path.read_text())) == 2

    slower = perf_run.Result("ViT_for_PyTorch", 1, SLOWER)
    assert perf_run.exit_code([slower], "npu") == 1 and perf_run.exit_code([slower], "cpu") == 3


def test_a_run_that_fails_is_red_whatever_an_earlier_one_left(stub, tmp_path, capsys):
    assert stub(100) == (0, NEW)
    assert stub("crash") == (1, "FAILED")
    assert "exit code 7; error: planted" in capsys.readouterr().out
    for arguments, message in (
        (["--data", "ViT=/nowhere"], "PROJECT=DIR"),
        (["--project", "none"], "unknown project"),
        (["--sample_data", str(tmp_path / "none"), "--device", "cpu"], "make sample_data"),
    ):
        with pytest.raises(UsageError, match=message):
            perf_run.main(arguments)


def test_folders_may_be_relative(stub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert stub(100, "--reports", "reports", "--baselines", "nights", "--update") == (0, NEW)
    assert (tmp_path / "nights" / "cpu" / "Stub_bs4_1p_perf.json").is_file()


def test_a_real_performance_script(tmp_path, monkeypatch, capsys):
    write_pictures(tmp_path / "pictures", count=16)
    settings = ["--config=configs/run_vit_demo.yaml", "--batch_size=4", "--max_steps=14"]
    monkeypatch.setitem(perf_run.SETTINGS["cpu"], "ViT_for_PyTorch", settings)
    monkeypatch.setenv("PATH", "/usr/bin:/bin")  # as without an activated environment
    places = ["--baselines", str(tmp_path / "baselines"), "--reports", str(tmp_path / "reports")]
    code = perf_run.main(["--device", "cpu", "--project", "ViT", "--data", f"ViT={tmp_path / 'pictures'}", *places])
    assert code == 0, capsys.readouterr().out
    (result,) = json.loads((tmp_path / "reports" / "results.json").read_text())
    assert result["verdict"] == NEW and result["fps"] > 0 and result["case"] == "ViT_for_PyTorch_bs4_1p_perf"
    assert result["key"]["batch"] == "4" and result["key"]["ranks"] == 1 and result["memory_mib"] > 0
