"""Compiles the C++ side once and finds it again by the hash of its source, torch and compiler."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import tempfile
from pathlib import Path
from types import ModuleType

import torch

SOURCES = Path(__file__).resolve().parents[2] / "csrc"
CACHE = Path(__file__).resolve().parents[4] / ".cache" / "fake_npu"
NAME = "fake_npu_native"
FLAGS = ["-O1", "-g0", "-std=c++20", "-Wno-deprecated-declarations"]


def compiler() -> str | None:
    """The C++ compiler that torch.utils.cpp_extension will call, or None."""
    return shutil.which(os.environ.get("CXX", "c++"))


def library() -> Path:
    """Where the compiled module of this source is, or will be."""
    digest = hashlib.sha256(f"{torch.__version__} {torch.version.git_version} {FLAGS}".encode())
    for path in sorted(SOURCES.iterdir()):
        digest.update(path.read_bytes())
    return CACHE / digest.hexdigest()[:16] / f"{NAME}.so"


def build() -> Path:
    """Compiles if needed (about half a minute of one core) and returns the library's path.

    A build is moved into the cache when it is complete, so processes that build at once do no harm to each other.
    """
    path = library()
    if path.is_file():
        return path
    from torch.utils.cpp_extension import load as compile_and_load

    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as folder:
        compile_and_load(NAME, [str(SOURCES / "fake_npu.cpp")], extra_cflags=FLAGS, build_directory=folder)
        path.parent.mkdir(exist_ok=True)
        os.replace(Path(folder) / path.name, path)
    return path


def load() -> ModuleType:
    spec = importlib.util.spec_from_file_location(NAME, build())
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
