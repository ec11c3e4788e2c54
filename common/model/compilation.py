"""torch.compile for the projects: one function a kind of block, whole graphs, refused where it cannot work.

    run = compiled(run_block, device)      # run_block(block, x, ...): all blocks of one shape share its graph
    run(block, x, ...)

Blocks and not models: a block is compiled once however many there are, so the first step takes seconds and not minutes.
Values that differ from block to block (a drop rate) come in as tensors, since a number would be compiled in.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Callable

import torch

from common.device import require_eager
from common.errors import UsageError

BACKEND = "inductor"
MAX_GRAPHS = 4  # of one function: the first, and three recompilations; more is a mistake in how it is called


def compiled(function: Callable, device: torch.device, option: str = "--compile", dynamic: bool = False) -> Callable:
    """`function` under torch.compile, without graph breaks.

    Args:
        dynamic: for any sizes, by one graph; else each set of sizes has one of its own.

    Raises:
        UsageError: on an npu, or where the device's code generator has no compiler to call.
        torch._dynamo.exc.Unsupported: when called, where its graph would break or a fifth one be needed.
    """
    require_eager(device, option)
    if BACKEND == "inductor":
        _require_compiler(device, option)
    torch._dynamo.config.recompile_limit = MAX_GRAPHS
    # two sizes that are equal the first time, such as 64 rows of 64 tokens, are not taken for one
    torch.fx.experimental._config.use_duck_shape = False
    return torch.compile(function, fullgraph=True, dynamic=dynamic, backend=BACKEND)


def _require_compiler(device: torch.device, option: str) -> None:
    if device.type == "cuda" and importlib.util.find_spec("triton") is None:
        raise UsageError(f"{option}: torch.compile on cuda needs triton, which is not installed; leave {option} out")
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "clang++", "c++"]
    if device.type == "cpu" and not any(shutil.which(name) for name in names):
        raise UsageError(f"{option}: torch.compile on a CPU needs a C++ compiler ({', '.join(names)}), there is none")
