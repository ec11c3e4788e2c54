"""The simulated npu device itself, its operators, and the projects' patches on it: ci/fake_npu/test, in one process."""

import subprocess
import sys
from pathlib import Path

import pytest

from ci import fake_npu

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(fake_npu.why_missing() is not None, reason=str(fake_npu.why_missing()))


def test_on_the_simulated_device(tmp_path):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "ci/fake_npu/test"]
    done = subprocess.run(command, cwd=ROOT, env=fake_npu.environment(tmp_path), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
