"""env_npu.sh: its presets, what the user has set, names that the documents have, and time-outs in their relation."""

import os
import re
import subprocess
from pathlib import Path

import pytest

from common import npu

SCRIPT = Path(__file__).parents[1] / "launch" / "env_npu.sh"
DOCUMENTED = {
    line
    for line in (Path(__file__).parent / "golden" / "npu_environment_variables.txt").read_text().splitlines()
    if not line.startswith("#")
}


def variables(tmp_path, **given: str) -> dict[str, str]:
    """What a run gets from env_npu.sh on a host without CANN."""
    clean = {k: v for k, v in os.environ.items() if k not in DOCUMENTED and k != "ASCEND_HOME_PATH"}
    environment = {**clean, "HOME": str(tmp_path), "CANN_INSTALL_INFO": str(tmp_path / "none"), **given}
    done = subprocess.run(
        ["bash", "-euc", f'source "{SCRIPT}" >&2; env -0'], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    now = dict(line.split("=", 1) for line in done.stdout.split("\0") if line)
    return {name: now[name] for name in DOCUMENTED & now.keys()}


@pytest.mark.parametrize("preset", ["speed", "debug", "deterministic"])
def test_presets_keep_what_the_user_has_set(tmp_path, preset):
    found = variables(tmp_path, NPU_PRESET=preset)
    assert found["PYTORCH_NPU_ALLOC_CONF"] == "expandable_segments:True"
    assert ("HCCL_DETERMINISTIC" in found) == (preset == "deterministic")
    assert found["TASK_QUEUE_ENABLE"] == {"speed": "2", "debug": "0", "deterministic": "1"}[preset]
    own = dict.fromkeys(found, "7")
    assert variables(tmp_path, NPU_PRESET=preset, **own) == own


def test_an_unknown_preset_is_one_line(tmp_path):
    environment = os.environ | {"NPU_PRESET": "fast", "HOME": str(tmp_path)}
    done = subprocess.run(["bash", "-euc", f'source "{SCRIPT}"'], env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and "NPU_PRESET=fast: choose speed, debug or deterministic" in done.stderr


def test_every_name_is_one_of_the_documents():
    used = set(re.findall(r"^\s*preset ([A-Z_0-9]+)=", SCRIPT.read_text(), re.M))
    assert len(used) > 10 and used <= DOCUMENTED


def test_the_group_waits_longer_than_hccl_and_the_printed_limit_is_hccl_s(tmp_path, monkeypatch):
    found = variables(tmp_path)
    for name in ("HCCL_CONNECT_TIMEOUT", "HCCL_EXEC_TIMEOUT"):
        monkeypatch.setenv(name, found[name])
    group, collective = npu.group_timeouts(1800, 600)
    assert group > int(found["HCCL_CONNECT_TIMEOUT"]) and group > int(found["HCCL_EXEC_TIMEOUT"]) == collective
    monkeypatch.setenv("HCCL_EXEC_TIMEOUT", "7200")
    assert npu.group_timeouts(1800, 600) == (7260, 7200)
