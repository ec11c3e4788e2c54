"""MFU, model FLOPs utilisation: what a step's matrix products need, over what the device could do in that time.

    python -m ci.first_run.utilisation flops ViT_for_PyTorch DATA FOLDER 20   # of a step, from the case's data
    python -m ci.first_run.utilisation peaks cpu fp32 bf16                 # of a device: {precision: [FLOP/s, source]}

Both in a process of their own. The counting mode stands between torch and its kernels, which moves last bits in some
projects: no run that is compared with others is counted. It counts on a CPU, whose patches compute nothing that the
model does not need.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from ci.gates import training_steps
from ci.training_cases import CASES, COUNTED, ROOT
from common import device as devices

# FLOP/s of dense matrix products by the card's name as its driver gives it. fp32 is without TF32, as we train.
_A100 = ({"fp32": 19.5e12, "bf16": 312e12, "fp16": 312e12}, "NVIDIA A100 data sheet")
_HOPPER = {"fp32": 67e12, "bf16": 989.4e12, "fp16": 989.4e12}
PEAKS: dict[str, tuple[dict[str, float], str]] = {
    "Tesla V100": ({"fp32": 15.7e12, "fp16": 125e12}, "NVIDIA V100 data sheet"),
    "NVIDIA A100": _A100,
    "NVIDIA H100 80GB HBM3": (_HOPPER, "NVIDIA H100 data sheet, SXM"),
    "NVIDIA H200": (_HOPPER, "NVIDIA H200 data sheet, SXM"),
    "Ascend910A": ({"fp16": 256e12}, "H. Liao et al., DaVinci, Hot Chips 31 (2019)"),
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SMALLEST, LARGEST, LONG_S = 512, 16384, 0.02  # of the square products where no document says


def _attention(query, key, value, *_, **__) -> int:
    return sdpa_flop_count(query, key, value)


def _attention_backward(slope, query, key, value, *_, **__) -> int:
    return sdpa_backward_flop_count(slope, query, key, value)


CPU_ATTENTION = {  # which torch's counter has no formula for
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}


class _Counted(training_steps.Observer):
    """Counts all steps after the first, to `last`."""

    def __init__(self, last: int) -> None:
        self.last = last
        self.counter = FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION)

    def step_ended(self, step: int, samples: int) -> None:
        if step == 1:
            self.counter.__enter__()
        elif step == self.last:
            self.counter.__exit__(None, None, None)
            raise training_steps.TrainingStopped


def count(project: str, data: Path, folder: Path, steps: int) -> float:
    """FLOPs of a step of the project's small case, the mean over steps 2 to `steps`. Call it once in a process."""
    training_steps.use_tree(ROOT, project)
    observer = _Counted(steps)
    arguments = CASES[project].command(data, COUNTED, folder, "cpu", "fp32", "--seed", "1")
    if not training_steps.train(CASES[project].entry, arguments, observer):
        raise RuntimeError(f"{project} ended before step {steps}")
    return observer.counter.get_total_flops() / (steps - 1)


def peak(device: torch.device, precision: str) -> tuple[float, str]:
    """FLOP/s of a device and where the number is from: a document, or a square product measured here.

    (0, "") for a precision that the card lacks, which its runs say themselves.
    """
    known, source = next((row for name, row in PEAKS.items() if devices.describe(device).startswith(name)), ({}, ""))
    if device.type != "cpu" and precision in known:
        return known[precision], source
    # a CPU without instructions for half precision multiplies it fastest in fp32, as our runs do
    types = {DTYPES[precision], torch.float32} if device.type == "cpu" else {DTYPES[precision]}
    try:
        return max(_measured(device, dtype) for dtype in types), "best matrix product measured here"
    except RuntimeError:
        return 0.0, ""


def _measured(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of the best square product, of matrices that grow until one takes long enough."""
    best, size, seconds = 0.0, SMALLEST, 0.0
    while seconds < LONG_S and size <= LARGEST:
        left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))  # [S, S]
        seconds = min(_timed(device, left, right) for _ in range(4))
        best, size = max(best, 2 * size**3 / seconds), 2 * size
    return best


def _timed(device: torch.device, left: torch.Tensor, right: torch.Tensor) -> float:
    devices.synchronize(device)
    began = time.perf_counter()
    torch.mm(left, right)
    devices.synchronize(device)
    return time.perf_counter() - began


def ask(*words: object) -> dict:
    """What this module prints for the given words, run in a process of its own.

    Raises:
        RuntimeError: with the last line that it said.
    """
    command = [sys.executable, "-m", "ci.first_run.utilisation", *map(str, words)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError((done.stderr.strip() or "no output").splitlines()[-1][:300])
    return json.loads(done.stdout.splitlines()[-1])


def main(what: str, *words: str) -> None:
    if what == "flops":
        project, data, folder, steps = words
        answer: dict = {"flops": count(project, Path(data), Path(folder), int(steps))}
    else:
        device = devices.resolve(words[0])
        answer = {precision: peak(device, precision) for precision in words[1:]}
    print(json.dumps(answer))


if __name__ == "__main__":
    main(*sys.argv[1:])
