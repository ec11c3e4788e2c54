"""A trial project for the tests of launch.sh."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

COMMON = Path(__file__).resolve().parents[1]
SCRIPT = """#!/usr/bin/env bash
# A trial launch. Usage: bash test/trial.sh --data_path=DIR
Network=Trial; CaseKind=acc; RankSize=1
ExtraFlags="model_path"; batch_size=4
source "$(dirname "${BASH_SOURCE[0]}")/../../common/launch/launch.sh" "$@"
require data_path
launch run.py --data "$data_path" --batch_size "$batch_size" --model "$model_path"
"""
PROGRAM = """
import json, os, sys, time
print("ARGS", json.dumps(sys.argv[1:]), flush=True)
rank = os.environ.get("RANK", "0")
if f"--die={rank}" in sys.argv:
    print("the cause is here", file=sys.stderr)
    sys.exit(7)
if "--sleep" in sys.argv:
    open(f"started{rank}", "w").close()
    time.sleep(300)
if "--bar" in sys.argv:
    print("10%\\r20%\\r100%", file=sys.stderr)
print("cores", sorted(os.sched_getaffinity(0)), os.environ.get("OMP_NUM_THREADS"), os.environ.get("ASCEND_DEVICE_ID"))
"""


@pytest.fixture
def project(tmp_path) -> Path:
    """A project folder with a space in its path beside a copy of common/."""
    root = tmp_path / "the repo"
    shutil.copytree(COMMON, root / "common", ignore=shutil.ignore_patterns("test", "__pycache__"))
    folder = root / "Trial_for_PyTorch"
    (folder / "test").mkdir(parents=True)
    (folder / "test" / "trial.sh").write_text(SCRIPT)
    (folder / "run.py").write_text(PROGRAM)
    (root / "my pictures").mkdir()
    return folder


@pytest.fixture
def small_disk(tmp_path):
    """A disk of one megabyte; skipped where nothing may be mounted."""
    folder = tmp_path / "small disk"
    folder.mkdir()
    mounted = os.geteuid() == 0 and not subprocess.call(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder])
    if not mounted:
        pytest.skip("needs to mount a tmpfs")
    yield folder
    subprocess.check_call(["umount", "-l", folder])
