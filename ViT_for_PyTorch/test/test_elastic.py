"""--max_restarts: a rank that dies in the middle of a run, and the run that goes on."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from PIL import Image

from common.run import result_file

PROJECT = Path(__file__).resolve().parents[1]
SAVE_EVERY, KILL_AFTER, LAST = 20, 24, 60


def logged(output: Path) -> list[tuple[int, float]]:
    """(step, loss) in the order in which they were logged."""
    path = output / "metrics.jsonl"
    lines = [json.loads(text) for text in path.read_text().splitlines()] if path.exists() else []
    return [(line["step"], line["loss"]) for line in lines if line["kind"] == "train"]


def processes_of(output: Path) -> list[int]:
    """The Python processes that train into `output`, without the shells around them."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "cmdline").read_bytes().split(b"\0")
        except OSError:  # it has just ended
            continue
        if words[1:2] == [b"run_vit.py"] and str(output).encode() in words:
            found.append(int(folder.name))
    return sorted(found)


def test_a_rank_killed_mid_run_starts_again_and_gives_the_same_losses(tmp_path):
    for index, name in enumerate(("blue", "red")):
        (tmp_path / "data" / "train" / name).mkdir(parents=True)
        for number in range(16):
            colour = (200 * index, 12 * number, 200 - 200 * index)
            Image.new("RGB", (20, 20), colour).save(tmp_path / "data" / "train" / name / f"{number:02}.png")
    output = tmp_path / "output"
    command = ["bash", "test/train_full_8p.sh", f"--data_path={tmp_path / 'data'}", f"--output_dir={output}"]
    command += ["--config=configs/run_vit_demo.yaml", "--batch_size=4", "--epochs=100", f"--max_steps={LAST}"]
    command += ["--nproc=2", "--device=cpu", "--max_restarts=1", "--collective_timeout=60", "--", "model.img_size=16"]
    command += ["data.num_workers=0", "do_eval=false", "--log_every=1", f"--save_every={SAVE_EVERY}"]
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    run = subprocess.Popen(
        command, cwd=PROJECT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    deadline = time.monotonic() + 300
    while not any(step >= KILL_AFTER for step, _ in logged(output)):
        assert run.poll() is None and time.monotonic() < deadline, run.communicate()[0]
        time.sleep(0.02)
    victim = processes_of(output)[1]
    os.kill(victim, signal.SIGKILL)
    printed = run.communicate()[0]
    assert run.returncode == 0, printed
    resumed = [f"resuming from step {step} (" in printed for step in (SAVE_EVERY, 2 * SAVE_EVERY)]
    assert any(resumed), printed  # it may have come that far

    steps = [step for step, _ in logged(output)]
    losses = dict(logged(output))
    assert steps == list(range(1, LAST + 1)), "steps that were taken twice stand in the log once"
    assert losses.keys() == set(steps)
    result = result_file.read(next(output.glob("*_2p_acc.log")))
    assert result["Status"] == "OK"
    logs = "".join(path.read_text() for path in output.glob("train_[01].log"))
    assert "could not go on with the other ranks: ended: rank" in logs
