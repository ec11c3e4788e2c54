"""Compiles the C++ side once and finds it again by the hash of its source, torch and compiler."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from types import ModuleType

import torch

SOURCES = Path(__file__).resolve().parents[2] / "csrc"
CACHE = Path(__file__).resolve().parents[5] / ".cache" / "fake_npu"
NAME = "fake_npu_native"
FLAGS = ["-O1", "-g0", "-std=c++20", "-Wno-deprecated-declarations"]


def compiler() -> str | None:
    """The C++ compiler that torch.utils.cpp_extension will call, or None."""
    return shutil.which(os.environ.get("CXX", "c++"))


def library() -> Path:
    """Where the compiled module of this source is, or will be, for this torch and this Python."""
    built_for = f"{torch.__version__} {torch.version.git_version} {sys.implementation.cache_tag} {FLAGS}"
    digest = hashlib.sha256(built_for.encode())
    for path in sorted(SOURCES.iterdir()):
        digest.update(path.read_bytes())
    return CACHE / digest.hexdigest()[:16] / f"{NAME}.so"


def build() -> Path:
    """Compiles if needed (about half a minute of one core) and returns the library's path.

    A build is moved into the cache when it is complete, so processes that build at once do no harm to each other.
    torch loads what it compiles, so a process of its own does it: this one must not get the device, as its autograd
    would start threads for it and refuse to work in forks.

    Raises:
        RuntimeError: with the compiler's output, when it fails.
    """
    path = library()
    if path.is_file():
        return path
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as folder:
        environment = {**os.environ, "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}  # which would build, too
        done = subprocess.run(
            [sys.executable, __file__, str(SOURCES / "fake_npu.cpp"), folder],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        if done.returncode:
            raise RuntimeError(f"the simulated npu device does not compile:\n{done.stdout}")
        path.parent.mkdir(exist_ok=True)
        os.replace(Path(folder) / path.name, path)
    return path


def _compile(source: str, folder: str) -> None:
    from torch.utils.cpp_extension import load as compile_and_load

    compile_and_load(NAME, [source], extra_cflags=FLAGS, build_directory=folder)


def load() -> ModuleType:
    spec = importlib.util.spec_from_file_location(NAME, build())
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    _compile(*sys.argv[1:])
