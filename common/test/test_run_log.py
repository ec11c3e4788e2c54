"""The log and the result file of a run: what users and collectors read."""

import json
import platform
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from common.distributed import World
from common.errors import UsageError, sentence
from common.network.lost_ranks import RanksLost
from common.run import result_file, utilisation
from common.run.metrics_file import read_evaluations
from common.run_log import RunLog
from common.update import NonFiniteStep

ROOT = Path(__file__).resolve().parents[2]


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


def test_evaluations_are_drawn_by_what_they_measure(tmp_path):
    metrics = tmp_path / "metrics.jsonl"
    assert read_evaluations(metrics) == ("", {})
    rows = [{"kind": "eval", "step": step, "loss": 1.0, "top1": 10.0 * step} for step in (1, 2)]
    metrics.write_text("".join(json.dumps(row) + "\n" for row in [*rows, {"kind": "train", "step": 3, "top1": 9.0}]))
    assert read_evaluations(metrics) == ("top1", {1: 10.0, 2: 20.0})
    metrics.write_text(json.dumps({"kind": "valid", "step": 5, "loss": 0.5}) + "\n")
    assert read_evaluations(metrics) == ("loss", {5: 0.5})


def test_metrics_hold_one_line_every_n_steps_and_the_rest(tmp_path):
    train(tmp_path, range(1, 13), 12)
    train_lines = [line for line in lines(tmp_path) if line["kind"] == "train"]
    assert [line["step"] for line in train_lines] == [5, 10, 12]
    assert train_lines[0]["loss"] == 7.0 and train_lines[0]["lr"] == 0.5 and train_lines[0]["data_ms"] >= 2
    assert set(train_lines[0]) == {"kind", "step", "epoch", "loss", "lr", "grad_norm", "fps", "data_ms", "memory_mib"}


def test_a_line_has_the_last_step_s_settings_and_the_mean_of_all_else(tmp_path):
    with RunLog(tmp_path, World(), "Net", batch_size=4, log_every=4) as log:
        for step, rate in enumerate((0.8, 0.4, 0.2, 0.1), 1):
            settings = {"lr": rate, "min_lr": rate / 2, "weight_decay": rate, "loss_scale": torch.tensor(2.0**step)}
            log.step(step, samples=4, loss=step, **settings, correct=rate)
        log.finish()
    line = lines(tmp_path)[0]
    assert [line[key] for key in ("lr", "min_lr", "weight_decay", "loss_scale")] == [0.1, 0.05, 0.1, 16.0]
    assert line["loss"] == 2.5 and line["correct"] == pytest.approx(0.375)


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
    assert values["StepTimeMs"] == pytest.approx(500)
    assert values["TrainingTime"] == pytest.approx(10 * 1000 / values["ActualFPS"])  # ModelZoo's awk line
    assert values["DeviceType"] == platform.machine() and "CPU" in values["DeviceName"]
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


def test_a_run_that_cannot_open_its_files_is_failed_and_not_running(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError), RunLog(tmp_path / "out", World(), "Net", 4, tensorboard_dir=tmp_path / "file"):
        pytest.fail("never came here")
    values = result_file.read(tmp_path / "out/Net_bs4_1p_acc.log")
    assert values["Status"] == "FAILED" and "FileExistsError" in values["Error"]


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


@pytest.mark.parametrize("steps", [1, 2, 10])
def test_a_run_that_ends_with_the_warm_up_has_an_fps_and_says_what_it_is(tmp_path, steps):
    with RunLog(tmp_path, World(), "Net", batch_size=4) as log:
        for step in range(1, steps + 1):
            log.step(step, samples=4, loss=1.0, lr=0.1)
        values = log.finish()
    assert values["ActualFPS"] > 0 and values["StepTimeMs"] > 0
    assert "warm-up steps are counted" in values["FPSNote"]


def test_the_block_says_what_the_accuracy_is(tmp_path, capsys):
    with RunLog(tmp_path, World(), "Net", batch_size=4) as log:
        log.step(1, samples=4, loss=1.0, lr=0.1)
        log.finish(accuracy=50.0, AccuracyIs="top-1 of held-out pictures, %")
    assert capsys.readouterr().out.splitlines()[-1] == "Accuracy is : top-1 of held-out pictures, %"


WANDB = """
import json
class Error(Exception): pass
class Run:
    def log(self, values): print("logged", json.dumps(values))
    def finish(self, exit_code): print("finished", exit_code)
def init(project, dir, name):
    if project == "closed": raise Error("not logged in")
    print("init", project, dir, name)
    return Run()
"""


def test_wandb_gets_the_scalars_where_its_variable_names_a_project(tmp_path, monkeypatch, capsys):
    (tmp_path / "wandb.py").write_text(WANDB)  # in the place of the real one
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    train(tmp_path / "out", range(1, 6), 5)
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith(("init", "logged", "finished"))]
    assert said[0] == f"init mine {tmp_path / 'out'} Net_bs4_1p_acc" and said[-1] == "finished 0"
    logged = json.loads(said[1].removeprefix("logged "))
    assert logged["step"] == 5 and logged["train/loss"] == 7.0 and logged["train/lr"] == 0.5
    monkeypatch.setenv("WANDB_PROJECT", "closed")
    with pytest.raises(UsageError, match="WANDB_PROJECT=closed: not logged in: use WANDB_MODE=offline"):
        train(tmp_path / "out2", range(1, 6), 5)
    monkeypatch.setitem(sys.modules, "wandb", None)  # as if it were not installed
    with pytest.raises(UsageError, match="wandb is not installed: pip install wandb"):
        train(tmp_path / "out", range(1, 6), 5)  # an earlier run's folder, which is left as it was
    assert result_file.read(tmp_path / "out/Net_bs4_1p_acc.log")["Status"] == "OK"
    assert not (tmp_path / "out/earlier").exists()


def test_a_crash_in_the_middle_of_a_line_costs_that_line_alone(tmp_path):
    """Cut by a full disk or a power loss, and glued by a run that went on in it."""
    train(tmp_path, range(1, 21), 20)
    metrics = tmp_path / "metrics.jsonl"
    whole = metrics.read_text().splitlines()
    metrics.write_text("\n".join([whole[0], whole[1][:30] + whole[2], whole[3][:20]]))
    train(tmp_path, range(16, 21), 20, resume=True)
    assert [line["step"] for line in lines(tmp_path)] == [5, 15, 20]


def test_tensorboard_goes_on_at_the_checkpoint_s_step(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(tmp_path, range(1, 21), 20)
    train(tmp_path, range(11, 31), 30, resume=True)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [5, 10, 15, 20, 25, 30]


def test_a_disk_that_fills_in_the_middle_of_a_file_is_told_with_the_folder(tmp_path):
    with pytest.raises(OSError) as full, RunLog(tmp_path, World(), "Net", batch_size=4), open("/dev/full", "w") as file:
        file.write("a file of nobody's care")
        file.flush()
    assert sentence(full.value) == f"{tmp_path}: No space left on device"


def test_a_rank_that_lost_the_others_says_so_in_a_line():
    assert sentence(RanksLost("rank 0 could not go on:\nended: rank 1")) == "rank 0 could not go on: ended: rank 1"


def test_a_step_that_was_not_finite_leaves_what_to_replay(tmp_path):
    with pytest.raises(NonFiniteStep), RunLog(tmp_path, World(), "Net", batch_size=4) as log:
        log.step(1, samples=4, loss=1.0, lr=0.1)
        raise NonFiniteStep("the loss became inf", {"step": 2, "ranks": {"0": ["a.jpg"]}})
    assert json.loads((tmp_path / "replay.json").read_text()) == {"step": 2, "ranks": {"0": ["a.jpg"]}}


@pytest.mark.parametrize(("loss", "accuracy"), [(float("nan"), 50.0), (1.0, float("inf"))])
def test_no_result_is_never_ok(tmp_path, loss, accuracy):
    with pytest.raises(FloatingPointError, match="not finite"), RunLog(tmp_path, World(), "Net", 4) as log:
        log.step(1, samples=4, loss=loss, lr=0.1)
        log.finish(accuracy=accuracy)
    with pytest.raises(UsageError, match="no training step"), RunLog(tmp_path, World(), "Net", 4) as log:
        log.finish()
    with RunLog(tmp_path, World(), "Net", 4) as log:
        log.step(1, samples=4, loss=loss, lr=0.1)
    for path in (tmp_path, *(tmp_path / "earlier").iterdir()):
        assert result_file.read(path / "Net_bs4_1p_acc.log")["Status"] == "FAILED"


def run_until(folder: Path, step: int, fault, resume: bool = False) -> tuple[str, str]:
    """Trains with a fault from `step` on, as an entry script's main; returns its output and its error."""
    code = (
        "import sys\nfrom common.distributed import World\nfrom common.errors import print_usage_errors\n"
        "from common.run_log import RunLog\n"
        "@print_usage_errors\ndef main():\n"
        f"    with RunLog(sys.argv[1], World(), 'Net', 4, log_every=1, resume={resume}) as log:\n"
        "        for step in range(1, 200):\n"
        f"            if step == {step}:\n                {fault}\n"
        "            log.step(step, 4, loss=1.0, lr=0.1)\n        log.finish()\nmain()\n"
    )
    process = subprocess.run([sys.executable, "-c", code, str(folder)], cwd=ROOT, capture_output=True, text=True)
    assert process.returncode == 1, process.stderr
    return process.stdout, process.stderr


def test_a_folder_that_is_deleted_in_mid_run_is_told_in_one_line(tmp_path):
    _, error = run_until(
        tmp_path / "out", 5, "import shutil; [shutil.rmtree(sys.argv[1], ignore_errors=True) for _ in range(50)]"
    )
    assert error == f"error: {tmp_path}/out/metrics.jsonl: was deleted or replaced while the run wrote to it\n"
    assert result_file.read(tmp_path / "out" / "Net_bs4_1p_acc.log")["Status"] == "FAILED"


def test_a_full_disk_is_told_and_an_older_ok_does_not_stay(small_disk):
    folder = small_disk / "out"
    train(folder, range(1, 6), 5)
    name = "Net_bs4_1p_acc.log"
    assert result_file.read(folder / name)["Status"] == "OK"
    fill = "import os; f = os.open(os.path.join(os.path.dirname(sys.argv[1]), 'filler'), os.O_WRONLY | os.O_CREAT)\n"
    fill += "                try:\n                    while True: os.write(f, bytes(512))\n"
    fill += "                except OSError: pass"
    _, error = run_until(folder, 3, fill, resume=True)
    assert re.fullmatch(rf"error: {folder}/(metrics.jsonl|tensorboard): No space left on device\n", error), error
    assert result_file.read(folder / name)["Status"] == "FAILED"


def test_mfu_is_the_models_flops_over_what_all_devices_could_do(tmp_path, monkeypatch):
    monkeypatch.setattr(utilisation, "peak", lambda device, precision: (1e9, f"a sheet for {precision}"))
    with RunLog(tmp_path, World(), "Net", 4, total_steps=20, log_every=5, skip_steps=5, precision="bf16") as log:
        for step in range(1, 21):
            time.sleep(0.01)
            log.step(step, 4, torch.tensor(1.0), 0.1, flops=2e6)
        log.finish()
    values = result_file.read(tmp_path / "Net_bs4_1p_acc.log")
    expected = 100 * 2e6 / (float(values["StepTimeMs"]) / 1000) / 1e9
    assert float(values["MFU"]) == pytest.approx(expected, rel=0.01) and expected < 20
    assert values["MFUPeak"] == "0.001 TFLOP/s a device in bf16 (a sheet for bf16)"
    steady = [line for line in lines(tmp_path) if "mfu" in line]
    assert steady and all(0 < line["mfu"] < 20 and line["memory_mib"] > 0 for line in steady)


def test_a_peak_is_a_documents_or_measured_without_a_random_draw(monkeypatch):
    before = torch.get_rng_state()
    flops, source = utilisation.peak(torch.device("cpu"), "fp32")
    assert flops > 1e8 and source == "best matrix product measured here" and torch.equal(before, torch.get_rng_state())
    monkeypatch.setattr(utilisation.devices, "describe", lambda device: "NVIDIA H100 80GB HBM3")
    assert utilisation.peak(torch.device("cuda"), "bf16") == (989.4e12, "NVIDIA H100 data sheet, SXM")


@pytest.mark.parametrize(
    ("name", "flops"),
    [
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A100 80GB PCIe", 312e12),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", 1.0),  # a seventh of the card
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", 1.0),
        ("NVIDIA H200 NVL", 1.0),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", 1.0),
        ("Tesla V100-SXM2-32GB", 125e12),
        ("Tesla V100-PCIE-32GB", 1.0),
    ],
)
def test_a_card_is_not_taken_for_another_whose_name_begins_likewise(monkeypatch, name, flops):
    monkeypatch.setattr(utilisation.devices, "describe", lambda device: name)
    monkeypatch.setattr(utilisation, "_measured", lambda device, dtype: 1.0)
    assert utilisation.peak(torch.device("cuda"), "fp16")[0] == flops


def test_a_finished_run_that_is_started_again_keeps_its_result(tmp_path):
    before = {key: str(value) for key, value in train(tmp_path, range(1, 11), 10).items()}
    train(tmp_path, range(0), 10, resume=True)
    after = result_file.read(tmp_path / "Net_bs4_1p_acc.log")
    assert after == before | {"PeakMemoryMiB": after["PeakMemoryMiB"]} and float(after["ActualFPS"]) > 0
