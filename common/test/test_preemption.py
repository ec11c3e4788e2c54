"""A signal to a run: the step ends, all ranks agree, the exit status says start me again."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from common.errors import PREEMPTED
from common.run import preemption, result_file

ROOT = Path(__file__).resolve().parents[2]
LOOP = """
import multiprocessing, os, signal, sys, time
for number in (signal.SIGTERM, signal.SIGUSR1):  # a shell in the background starts its commands with some ignored
    signal.signal(number, signal.SIG_DFL)
signal.signal(signal.SIGINT, signal.default_int_handler)
from common.distributed import process_group
from common.run_log import RunLog

folder, kind = sys.argv[1:3]
alone = kind == "evaluation"
with process_group("cpu") as world, RunLog(folder, world, "Net", 4, log_every=1, evaluation=alone) as log:
    if kind == "deaf":
        import torch.distributed as dist
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    if kind == "child":
        child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(600,), daemon=True)
        child.start()
        print("child", child.pid, flush=True)
    for step in range(1, 100000):
        time.sleep(0.01)
        log.step(step, 4, loss=1.0, lr=0.1)
        if kind not in ("unwatched", "evaluation") and log.preempted():
            if world.is_main:
                time.sleep(1.5)  # as a checkpoint takes
            print("saved at", step, flush=True)
            raise log.stopped(step)
        if step == 5:
            print("ready", flush=True)
            if kind == "deaf":
                store.wait(["a key that nobody sets"])
"""


def start(folder: Path, kind: str = "", ranks: int = 1) -> list[subprocess.Popen]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    runs = []
    for rank in range(ranks):
        env = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
        if ranks > 1:
            env |= {
                "RANK": str(rank),
                "WORLD_SIZE": str(ranks),
                "LOCAL_RANK": str(rank),
                "LOCAL_WORLD_SIZE": str(ranks),
            }
            env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        command = [sys.executable, "-c", LOOP, str(folder), kind]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        runs.append(subprocess.Popen(command, cwd=ROOT, env=env, **pipes))
    return runs


def wait_for(run: subprocess.Popen, text: str) -> str:
    for line in run.stdout:
        if text in line:
            return line
    raise AssertionError(f"the run ended with {run.wait()} without saying {text}")


def result(folder: Path) -> dict[str, str]:
    return result_file.read(next(folder.glob("*_acc.log")))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_to_one_rank_stops_all_after_the_same_step(tmp_path, number):
    runs = start(tmp_path, ranks=2)
    for run in runs:
        wait_for(run, "ready")
    runs[1].send_signal(number)
    outputs = [run.communicate(timeout=600)[0] for run in runs]
    assert [run.returncode for run in runs] == [PREEMPTED, PREEMPTED], outputs
    steps = [re.search(r"saved at (\d+)", output)[1] for output in outputs]
    assert steps[0] == steps[1] and f"stopped after step {steps[0]}" in outputs[0]
    values = result(tmp_path)
    assert values["Status"] == "PREEMPTED" and f"step {steps[0]}" in values["Note"]
    assert not (tmp_path / ".lock").exists()


def test_ctrl_c_asks_once(tmp_path):
    (run,) = start(tmp_path)
    wait_for(run, "ready")
    run.send_signal(signal.SIGINT)
    output = run.communicate(timeout=600)[0]
    assert run.returncode == 130 and "saved at" in output and "Traceback" not in output
    assert result(tmp_path)["Status"] == "PREEMPTED"


def test_a_second_signal_ends_a_run_that_waits_for_ever_and_a_doubled_one_does_not(tmp_path):
    (run,) = start(tmp_path, "deaf")
    wait_for(run, "ready")
    for _ in range(2):  # as a launcher and a process group pass it on
        run.send_signal(signal.SIGTERM)
    wait_for(run, "SIGTERM: the step is ended")
    time.sleep(1.5)
    assert run.poll() is None
    run.send_signal(signal.SIGTERM)
    assert run.wait(timeout=600) == 128 + signal.SIGTERM


def test_before_the_loop_asks_a_signal_ends_the_run_with_a_word(tmp_path):
    (run,) = start(tmp_path, "unwatched")
    wait_for(run, "ready")
    run.terminate()
    assert run.wait(timeout=600) == 128 + signal.SIGTERM
    values = result(tmp_path)
    assert values["Status"] == "FAILED" and values["Error"].endswith("ended by SIGTERM")


def test_an_evaluation_alone_ends_at_the_first_signal_and_says_start_me_again(tmp_path):
    runs = start(tmp_path, "evaluation", ranks=2)
    for run in runs:
        wait_for(run, "ready")
    for run in runs:
        run.send_signal(signal.SIGUSR1)
    outputs = [run.communicate(timeout=600)[0] for run in runs]
    assert [run.returncode for run in runs] == [PREEMPTED, PREEMPTED], outputs
    assert result(tmp_path)["Status"] == "PREEMPTED" and "Traceback" not in "".join(outputs)


def test_an_evaluation_inside_a_training_ends_on_all_ranks():
    with preemption.Watch():
        signal_at_two = (signal.raise_signal(signal.SIGTERM) or n if n == 2 else n for n in range(9))
        assert list(preemption.until_asked(signal_at_two)) == [0, 1]
        with pytest.raises(preemption.Interrupted):
            preemption.stop_if_asked()
    preemption.stop_if_asked()  # nobody is asked any more


def test_an_evaluation_has_a_bar_where_there_is_a_terminal(monkeypatch, capsys):
    assert list(preemption.until_asked(range(3))) == [0, 1, 2] and capsys.readouterr().err == ""
    monkeypatch.setenv("PROGRESS_BAR", "1")  # the launcher's word that there is one behind it
    assert list(preemption.until_asked(range(3))) == [0, 1, 2]
    assert "evaluate:   0%" in capsys.readouterr().err


def test_a_log_inside_a_log_gives_the_signals_back():
    before = signal.getsignal(signal.SIGUSR1)
    with preemption.Watch() as outer:
        outer.agreed()
        with preemption.Watch():
            assert not preemption.asked()
        signal.raise_signal(signal.SIGUSR1)
        assert preemption.asked() and list(preemption.until_asked(range(3))) == [] and outer.agreed()
    assert signal.getsignal(signal.SIGUSR1) is before and not preemption.asked()


def test_a_signal_to_a_forked_worker_is_none_to_the_run(tmp_path):
    (run,) = start(tmp_path, "child")
    child = int(wait_for(run, "child").split()[1])
    wait_for(run, "ready")
    for number in (signal.SIGUSR1, signal.SIGINT):
        os.kill(child, number)
        time.sleep(1.2)
    assert run.poll() is None and Path(f"/proc/{child}").exists()
    run.send_signal(signal.SIGUSR1)
    assert "saved at" in run.communicate(timeout=600)[0] and run.returncode == PREEMPTED


# What the loader's workers are told to end by, torch takes for their failure: it raised, and 75 became 1.
WITH_WORKERS = """
from torch.utils.data import DataLoader
from common.errors import Preempted, print_usage_errors

@print_usage_errors
def main():
    batches = iter(DataLoader(range(8), num_workers=2))
    next(batches)
    raise Preempted("stopped")

main()
"""


def test_a_preempted_run_with_loader_workers_says_start_me_again():
    done = subprocess.run([sys.executable, "-c", WITH_WORKERS], cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert (done.returncode, done.stderr) == (PREEMPTED, "")


def test_a_rank_that_is_done_leaves_before_the_interpreter_is_taken_apart(tmp_path):
    """Where threads of gloo abort it now and then. Not under a profiler, which has its own work at the end."""
    script = tmp_path / "script.py"
    script.write_text(
        "import atexit\nfrom common.errors import print_usage_errors\n"
        "class Held:\n    def __del__(self):\n        print('taken apart')\n"
        "held = Held()\natexit.register(print, 'exit functions')\n"
        "@print_usage_errors\ndef main():\n    print('done')\nmain()\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "RANK": "0"}

    def said(*words: str) -> list[str]:
        done = subprocess.run([sys.executable, *words, str(script)], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return [line for line in done.stdout.splitlines() if line in ("done", "exit functions", "taken apart")]

    assert said("-u") == ["done", "exit functions"]
    assert {"done", "exit functions", "taken apart"} == set(said("-m", "cProfile"))
    del environment["RANK"]
    assert said() == ["done", "exit functions", "taken apart"]
