"""`make first-run`: the report of a run that is well, and of one whose losses are planted elsewhere."""

import json

import pytest

from ci.first_run import __main__ as first_run
from ci.first_run.report import Run, advice


@pytest.fixture
def away(tmp_path, monkeypatch):
    """Stored curves and reports in a folder of this test."""
    monkeypatch.setattr(first_run, "REPORTS", tmp_path / "reports")
    monkeypatch.setattr(first_run, "CURVES", tmp_path / "curves")
    return tmp_path


def test_a_report_ends_in_words_about_what_is_wrong(away, capsys):
    only = ["--device", "cpu", "--project", "ViT", "--precision", "fp32"]
    first_run.main([*only, "--store"])
    first_run.main(only)
    report = (away / "reports" / "first_run-cpu.md").read_text()
    assert "| ViT_for_PyTorch | fp32 | 0.69" in report and "| 0.000 % (the CPU) |" in report and "| none |" in report
    row = next(line for line in report.splitlines() if line.startswith("| ViT_for_PyTorch"))
    mfu, _, host_waits, data = (cell.strip() for cell in row.split("|")[7:11])
    assert (
        0 < float(mfu.removesuffix(" %")) < 100
        and "TFLOP/s a device in fp32 (best matrix product measured here)." in report
    )
    assert float(host_waits) >= 1 and data.endswith(" %") and "- ViT_for_PyTorch: most time is in " in report
    assert "good   torch" in report, "the doctor's words are in it"
    stored = away / "curves" / "cpu" / "ViT_for_PyTorch.json"
    curve = json.loads(stored.read_text())
    curve["losses"]["fp32"][7:] = [loss * 1.1 for loss in curve["losses"]["fp32"][7:]]
    stored.write_text(json.dumps(curve))
    assert first_run.main(only) == 1
    report = (away / "reports" / "first_run-cpu.md").read_text()
    assert "away from the CPU's (limit 0.2 %), from step 8 on" in report
    assert report.strip().endswith("(docs/on_a_card.md).**") and "Start with ViT_for_PyTorch in fp32" in report
    capsys.readouterr()


def test_what_crashed_comes_before_what_differs():
    crashed = Run("CLIP_for_PyTorch", "bf16", problem="exit code 1: no kernel")
    differs = Run("ViT_for_PyTorch", "fp32", problem="losses are 3 % away", losses=(1.0,))
    assert "Start with CLIP_for_PyTorch in bf16: exit code 1: no kernel" in advice([differs, crashed], False)
    assert advice([differs, crashed], True).startswith("Start with the first line that the doctor calls")
    half = Run("ViT_for_PyTorch", "fp16", problem="losses are 9 % away", losses=(1.0,))
    assert advice([half], False).startswith("Only half precision differs")
