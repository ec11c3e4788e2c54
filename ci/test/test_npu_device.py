"""The simulated npu device itself, its operators, and the projects' patches on it: ci/npu/fake/test, in one process."""

import subprocess
import sys
from pathlib import Path

import pytest

from ci.npu import fake as fake_npu

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(fake_npu.why_missing() is not None, reason=str(fake_npu.why_missing()))


def test_on_the_simulated_device(tmp_path):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "ci/npu/fake/test"]
    done = subprocess.run(command, cwd=ROOT, env=fake_npu.environment(tmp_path), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


@pytest.fixture
def small_builder(tmp_path, monkeypatch):
    """The module that compiles, with a source of two lines instead of the device's."""
    builder = fake_npu.builder()
    (tmp_path / "csrc").mkdir()
    monkeypatch.setattr(builder, "SOURCES", tmp_path / "csrc")
    monkeypatch.setattr(builder, "CACHE", tmp_path / "cache")
    (tmp_path / "csrc" / "fake_npu.cpp").write_text(
        "#include <pybind11/pybind11.h>\nPYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {}\n"
    )
    return builder


def test_a_build_is_not_loaded_by_the_process_that_asks_for_it(small_builder):
    """Else autograd would have threads for the device, and no later test could train in a forked process."""
    library = small_builder.build()
    assert library.is_file() and small_builder.build() == library
    assert str(library.parents[1]) not in Path("/proc/self/maps").read_text()


def test_a_build_that_fails_shows_the_compiler_s_words(small_builder, tmp_path):
    (tmp_path / "csrc" / "fake_npu.cpp").write_text("#error out of sand\n")
    with pytest.raises(RuntimeError, match="does not compile:(.|\n)*out of sand"):
        small_builder.build()
    assert not small_builder.library().exists()


def test_a_build_is_of_one_python(small_builder, monkeypatch):
    """Another Python in the same folder, as in a new environment, cannot load it."""
    ours = small_builder.library()
    monkeypatch.setattr(sys.implementation, "cache_tag", "cpython-399")
    assert small_builder.library() != ours
