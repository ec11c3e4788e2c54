"""Runs our npu patches under the real torch_npu's shape functions: `make npu-stub`.

The torch_npu wheel (44 MB) is fetched into `.npu_stub/` and only put on the path of the tests' own process: installed
beside a torch without CANN it would break `import torch`. The stand-in libraries (cann.c) take gcc half a second.
Nothing is computed: FakeTensorMode follows dtypes, shapes and devices. Simulated; not run on Ascend hardware.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from ci.npu.contract.contract import REQUIRED

ROOT = Path(__file__).resolve().parents[3]
FOLDER = ROOT / ".npu_stub"
VERSION = REQUIRED[0]
# the sonames that torch_npu's libraries ask for; one object serves as all of them
LIBRARIES = ("ascendcl", "hccl", "acl_op_compiler", "ge_runner", "graph", "acl_tdt_channel")


def main() -> int:
    wheel, libraries = fetch_wheel(), build_libraries()
    paths = [str(wheel), str(ROOT), os.environ.get("PYTHONPATH", "")]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(path for path in paths if path),
        "LD_LIBRARY_PATH": os.pathsep.join([str(libraries), os.environ.get("LD_LIBRARY_PATH", "")]),
        "STUB_NPU_DEVICES": "2",
        "TORCH_DEVICE_BACKEND_AUTOLOAD": "1",
    }
    tests = Path(__file__).with_name("test") / "test_npu_stub.py"
    return subprocess.run([sys.executable, "-m", "pytest", "-q", str(tests), *sys.argv[1:]], env=environment).returncode


def fetch_wheel() -> Path:
    """The unpacked wheel for this Python and processor."""
    folder = FOLDER / f"torch_npu-{VERSION}-py{sys.version_info[0]}{sys.version_info[1]}"
    if folder.exists():
        return folder
    FOLDER.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=FOLDER) as temporary:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        subprocess.run([*pip, "--no-cache-dir", "--dest", temporary, f"torch_npu=={VERSION}"], check=True)
        unpacked = Path(temporary) / "unpacked"
        with zipfile.ZipFile(next(Path(temporary).glob("*.whl"))) as archive:
            archive.extractall(unpacked)
        unpacked.rename(folder)
    return folder


def build_libraries() -> Path:
    """The folder of the stand-in libraries, built anew: it is quick."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        sys.exit("error: no C compiler found: install gcc")
    folder = FOLDER / "lib"
    folder.mkdir(parents=True, exist_ok=True)
    first = folder / f"lib{LIBRARIES[0]}.so"
    source = Path(__file__).with_name("cann.c")
    subprocess.run([compiler, "-O1", "-shared", "-fPIC", str(source), "-o", str(first)], check=True)
    for name in LIBRARIES[1:]:
        shutil.copyfile(first, folder / f"lib{name}.so")
    return folder


if __name__ == "__main__":
    sys.exit(main())
