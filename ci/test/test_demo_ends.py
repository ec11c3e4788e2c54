"""A demo ends as a whole: nothing goes on behind it."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# those that run two things side by side, and their first step
PAIRS = {"Data2vec_for_PyTorch": "bpe_encode.py", "Beit2_for_PyTorch": "test/pixel_teacher.py"}
SIGNALS = ("SIGTERM", "SIGINT of a terminal")
PYTHON = """#!/usr/bin/env bash
[[ $1 != "$FAILING" ]] || { while [[ ! -s $STARTED ]]; do sleep 0.05; done; exit 3; }
echo $$ >>"$STARTED"
exec sleep 600
"""


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def until(condition, seconds: float = 30) -> bool:
    end = time.monotonic() + seconds
    while not (met := condition()) and time.monotonic() < end:
        time.sleep(0.05)
    return bool(met)


@pytest.mark.parametrize(
    ("project", "way"),
    [(project, way) for project in PAIRS for way in ("failure", *SIGNALS)]
    + [(project, way) for project in ("ViT_for_PyTorch", "CLIP_for_PyTorch") for way in SIGNALS],
)
def test_nothing_goes_on_after_a_demo(tmp_path, project, way):
    commands, started = tmp_path / "bin", tmp_path / "started"
    commands.mkdir()
    (commands / "python3").write_text(PYTHON)
    (commands / "python3").chmod(0o755)
    pictures = tmp_path / "data" / "images" / "train" / "faces"
    pictures.mkdir(parents=True)
    for number in range(10):
        (pictures / f"{number}.png").touch()
    for folder in ("images", "images_openmoji"):
        (tmp_path / "data" / folder / "val").mkdir(parents=True)
    (tmp_path / "data" / "captioned_emoji").mkdir()
    (tmp_path / "data" / "captioned_emoji" / "train.jsonl").touch()
    started.touch()
    environment = os.environ | {
        "PATH": f"{commands}:{os.environ['PATH']}",
        "STARTED": str(started),
        "FAILING": PAIRS[project] if way == "failure" else "",
    }
    command = ["bash", str(ROOT / project / "test" / "demo.sh"), str(tmp_path / "data"), str(tmp_path / "output")]
    before = signal.signal(signal.SIGINT, signal.SIG_DFL)  # in the background it is ignored, and handed on
    try:
        demo = subprocess.Popen(command, env=environment, start_new_session=True)
    finally:
        signal.signal(signal.SIGINT, before)
    try:
        wanted = 2 if project in PAIRS and way != "failure" else 1
        assert until(lambda: len(started.read_text().splitlines()) >= wanted)
        if way == "SIGTERM":
            demo.terminate()
        elif way != "failure":
            os.killpg(demo.pid, signal.SIGINT)
        assert demo.wait(timeout=30) == {"failure": 3, "SIGTERM": 143}.get(way, 130)
        left = [int(pid) for pid in started.read_text().split()]
        assert until(lambda: not any(map(is_running, left)), 5)
    finally:
        for pid in map(int, started.read_text().split()):
            if is_running(pid):
                os.kill(pid, signal.SIGKILL)
        demo.kill()


@pytest.mark.parametrize(
    ("captions", "said"),
    [
        ("en", "CAPTIONS=en: give zh"),
        ("../captioned_icons", "give zh"),
        ("zh", "train.jsonl: no such file; make sample_data"),
    ],
)
def test_captions_are_english_or_chinese(tmp_path, captions, said):
    (tmp_path / "captioned_icons").mkdir()
    (tmp_path / "captioned_icons" / "train.jsonl").touch()
    command = ["bash", str(ROOT / "CLIP_for_PyTorch" / "test" / "demo.sh"), str(tmp_path), str(tmp_path / "output")]
    done = subprocess.run(command, env=os.environ | {"CAPTIONS": captions}, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and said in done.stderr


@pytest.mark.parametrize("project", [*PAIRS, "ViT_for_PyTorch", "CLIP_for_PyTorch"])
def test_a_demo_without_its_data_says_which_argument(project):
    command = ["bash", str(ROOT / project / "test" / "demo.sh")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and done.stderr.startswith(
        "error: which sample data? bash test/demo.sh SAMPLE_DATA_DIR"
    )
