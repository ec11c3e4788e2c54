"""The log and the result file of a run: what users and collectors read."""

import json
import time
from pathlib import Path

import pytest
import torch

from common import result_file
from common.distributed import World
from common.run_log import RunLog


def train(folder: Path, steps: range, total: int, **options) -> dict:
    with RunLog(folder, World(), "Net", batch_size=4, total_steps=total, log_every=5, skip_steps=3, **options) as log:
        for step in steps:
            with log.data_wait():
                time.sleep(0.002)
            log.step(step, samples=4, loss=torch.tensor(10.0 - step), lr=0.1 * step, grad_norm=1.0, epoch=step / 10)
        return log.finish(accuracy=50.0)


def lines(folder: Path) -> list[dict]:
    return [json.loads(text) for text in (folder / "metrics.jsonl").read_text().splitlines()]


def test_result_file_has_all_keys_with_values(tmp_path, capsys):
    train(tmp_path, range(1, 11), 10)
    values = result_file.read(tmp_path / "Net_bs4_1p_acc.log")
    assert set(result_file.KEYS) <= set(values) and all(values.values())
    assert values["Status"] == "OK" and values["CaseName"] == "Net_bs4_1p_acc" and values["TrainAccuracy"] == "50.0"
    assert float(values["ActualLoss"]) == 2.0  # mean of the last five steps: 4, 3, 2, 1, 0
    final = capsys.readouterr().out.split("------------------ Final result ------------------\n")[1].splitlines()
    assert final[0] == f"Final Performance images/sec : {values['ActualFPS']}"
    assert final[1] == "Final Train Accuracy : 50.0"
    assert final[2] == f"E2E Training Duration sec : {values['E2ETrainingTime']}"
    assert (tmp_path / "loss.png").stat().st_size > 1000
    assert len((tmp_path / "train_Net_bs4_1p_acc_loss.txt").read_text().splitlines()) == 2
    assert list((tmp_path / "tensorboard").iterdir())


def test_metrics_hold_one_line_every_n_steps_and_the_rest(tmp_path):
    train(tmp_path, range(1, 13), 12)
    train_lines = [line for line in lines(tmp_path) if line["kind"] == "train"]
    assert [line["step"] for line in train_lines] == [5, 10, 12]
    assert train_lines[0]["loss"] == 7.0 and train_lines[0]["lr"] == 0.5 and train_lines[0]["data_ms"] >= 2
    assert set(train_lines[0]) == {"kind", "step", "epoch", "loss", "lr", "grad_norm", "fps", "data_ms"}


def test_fps_leaves_out_first_steps_and_pauses_but_not_waiting_for_data(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def work(seconds: float) -> None:
        now[0] += seconds

    with RunLog(tmp_path, World(), "Net", batch_size=10, skip_steps=2, log_every=100) as log:
        for step in range(1, 7):
            work(30.0 if step <= 2 else 0.3)
            with log.data_wait():
                work(0.2)
            log.step(step, samples=10, loss=1.0, lr=0.1)
            if step == 4:
                with log.pause("evaluate"):
                    work(40.0)
        values = log.finish()
    assert values["ActualFPS"] == pytest.approx(40 / (4 * (0.3 + 0.2)))
    assert values["TrainingTime"] == pytest.approx(500)  # milliseconds a step
    assert any(line.get("evaluate_s") == 40.0 for line in lines(tmp_path))
    assert lines(tmp_path)[-1]["data_ms"] == pytest.approx(200)


def test_the_time_left_may_be_days(tmp_path, monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    with RunLog(tmp_path, World(), "Net", batch_size=10, total_steps=1000, skip_steps=2, log_every=10) as log:
        for step in range(1, 11):
            now[0] += 100.0
            log.step(step, samples=10, loss=1.0, lr=0.1)
    assert capsys.readouterr().out.strip().endswith("left 1 day, 3:30:00")  # 990 steps of 100 s


def test_a_crash_leaves_failed_with_the_reason(tmp_path):
    with pytest.raises(RuntimeError), RunLog(tmp_path, World(), "Net", batch_size=4) as log:
        log.step(1, samples=4, loss=1.0, lr=0.1)
        raise RuntimeError("first line\nout of memory")
    values = result_file.read(tmp_path / "Net_bs4_1p_acc.log")
    assert values["Status"] == "FAILED" and values["Error"] == "RuntimeError: out of memory"
    assert "ActualFPS" not in values


def test_resuming_appends_and_a_fresh_run_keeps_the_earlier_one_aside(tmp_path):
    (tmp_path / "train_0.log").write_text("the launcher's log stays\n")
    train(tmp_path, range(1, 11), 20)
    train(tmp_path, range(6, 21), 20, resume=True)  # goes over steps 6 to 10 again
    assert len((tmp_path / "train_Net_bs4_1p_acc_loss.txt").read_text().splitlines()) == 4
    assert [line["step"] for line in lines(tmp_path) if line["kind"] == "train"] == [5, 10, 15, 20]

    (tmp_path / "checkpoint-20.pth").write_text("a user's model")
    train(tmp_path, range(1, 6), 5)
    assert [line["step"] for line in lines(tmp_path) if line["kind"] == "train"] == [5]
    (aside,) = (tmp_path / "earlier").iterdir()
    assert {"metrics.jsonl", "Net_bs4_1p_acc.log", "checkpoint-20.pth", "loss.png"} <= {p.name for p in aside.iterdir()}
    assert (tmp_path / "train_0.log").exists()


def test_only_the_main_rank_writes(tmp_path):
    with RunLog(tmp_path / "out", World(rank=1, size=2), "Net", batch_size=4) as log:
        log.step(1, samples=8, loss=1.0, lr=0.1)
        log.record(1, "eval", top1=3.0)
        assert log.finish()["CaseName"] == "Net_bs4_2p_acc"
    assert not (tmp_path / "out").exists()


def test_a_run_shorter_than_the_warm_up_says_so(tmp_path):
    with RunLog(tmp_path, World(), "Net", batch_size=4) as log:
        for step in (1, 2):
            log.step(step, samples=4, loss=1.0, lr=0.1)
        assert "warm-up steps are counted" in log.finish()["FPSNote"]
