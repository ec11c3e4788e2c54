"""A file that a script exports: whole or not there, one process's, readable."""

import os
import signal
import stat
import subprocess
import sys

import numpy as np
import pytest
from safetensors.numpy import save_file

from common.errors import UsageError
from common.run import run_folder
from common.run.new_file import new_file, readable

WRITER = """
import signal, sys, time
from pathlib import Path
signal.signal(signal.SIGINT, signal.default_int_handler)  # a suite in the background hands on that it is ignored
from common.run.new_file import new_file
with new_file(Path(sys.argv[1])) as place:
    place.write_text("half")
    print("writing", flush=True)
    time.sleep(600)
"""


def test_whole_and_with_the_mode_of_open(tmp_path):
    (tmp_path / "plain").write_text("")
    with new_file(tmp_path / "a.safetensors") as place:
        save_file({"x": np.zeros(2)}, place)  # makes it private
    modes = {stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("plain", "a.safetensors")}
    assert len(modes) == 1 and sorted(os.listdir(tmp_path)) == ["a.safetensors", "plain"]
    save_file({"x": np.zeros(2)}, tmp_path / "folder.safetensors")
    readable(tmp_path)
    assert stat.S_IMODE((tmp_path / "folder.safetensors").stat().st_mode) in modes
    with (
        pytest.raises(UsageError, match="a.safetensors exists and is not overwritten"),
        new_file(place.parent / "a.safetensors"),
    ):
        pass
    with pytest.raises(ZeroDivisionError), new_file(tmp_path / "b") as place:
        place.write_text(str(1 / 0))
    assert not [name for name in os.listdir(tmp_path) if name.startswith((".", "b"))]


@pytest.mark.parametrize(
    "end, left", [(signal.SIGTERM, []), (signal.SIGINT, []), (signal.SIGKILL, [".x.lock", ".x.writing"])]
)
def test_one_process_writes_and_an_interrupted_one_leaves_nothing(tmp_path, end, left):
    with subprocess.Popen(
        [sys.executable, "-c", WRITER, str(tmp_path / "x")], stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout.readline() == "writing\n"
        with pytest.raises(UsageError, match=f"x belongs to the run of process {other.pid} "), new_file(tmp_path / "x"):
            pass
        assert (tmp_path / ".x.writing").read_text() == "half"
        other.send_signal(end)
    assert sorted(os.listdir(tmp_path)) == left
    with new_file(tmp_path / "x") as place:
        place.write_text("whole")
    assert os.listdir(tmp_path) == ["x"] and (tmp_path / "x").read_text() == "whole"


def test_a_run_that_starts_in_its_folder_leaves_it_alone(tmp_path):
    with new_file(tmp_path / "features.npz") as place:
        place.write_text("half")
        run_folder.tidy(tmp_path)
        assert place.read_text() == "half"
    place.write_text("what a killed process left")
    run_folder.tidy(tmp_path)
    assert os.listdir(tmp_path) == ["features.npz"]
