"""Training steps of the projects against their peers on one device: cuda, npu or cpu.

    python -m ci.peers.device_step --device cuda                    # all projects, bf16, eager and torch.compile
    python -m ci.peers.device_step --device cpu --size cpu --precision fp32 --only beit2
    python -m ci.peers.device_step --device cpu --size tiny --output_dir /tmp/steps

Each side runs in a process of its own, and all work by turns, eager and then compiled. A block of steps is timed with
the device synchronised at both ends, after warm-up (and compilation): wall seconds on an accelerator, CPU seconds on a
CPU. Beside the rate stand the matrix-product FLOPs of that side's own step as a share of the best rate of a bf16 (fp32)
matmul measured in the same run and of the card's data sheet (MFU), the peak memory, and how often the host waits for
the device in a step. Batches are on the device beforehand: this measures the step, not the input pipeline.
Results: ci/baselines/<device>/device_step_<project>_<precision>.json.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import math
import re
import statistics
import subprocess
import sys
import time
import traceback
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from ci.peers import ROOT
from ci.peers.paired_timing import gemm_peak
from ci.peers.steps.step import PROJECTS, Step, sides_of
from common import device as devices
from common.errors import UsageError, print_usage_errors
from common.run import utilisation

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
MATMUL_SIZES = (512, 2048, 4096, 8192)
LONG_MATMUL_S = 1e-3  # a product that takes this long has shown the device's peak: larger ones add nothing


@dataclass(frozen=True)
class Peaks:
    """FLOP/s of matrix products: the best measured here, and the data sheet's (0 = none)."""

    measured: float
    of_the_card: float


class Side:
    """A process that holds one side's model and does blocks of steps when told to.

    It starts at once; the first `answer` is what its step is. A refusal is raised as UsageError.
    """

    def __init__(self, project: str, name: str, options: argparse.Namespace):
        command = [sys.executable, "-m", "ci.peers.device_step", "--only", project, "--worker", name]
        command += ["--device", options.device, "--precision", options.precision, "--size", options.size]
        self.process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.facts: dict[str, Any] = {}
        self.compiled = False

    def ask(self, request: str) -> dict[str, Any]:
        self.tell(request)
        return self.answer()

    def tell(self, request: str) -> None:
        self.process.stdin.write(request + "\n")
        self.process.stdin.flush()

    def answer(self) -> dict[str, Any]:
        line = self.process.stdout.readline()
        if not line:
            raise UsageError(f"a side ended before it answered (exit {self.process.wait()}): its message is above")
        answer = json.loads(line)
        if "refused" in answer:
            raise UsageError(answer["refused"])
        return answer

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def work(options: argparse.Namespace) -> None:
    """The body of a side's process: answers `steps N`, `compile` and `memory`, first of all its facts."""
    device = devices.resolve(options.device)
    torch.set_num_threads(1)
    answer_to = sys.stdout
    sys.stdout = sys.stderr  # libraries that print must not break the answers
    worker = Worker(options, device)
    for line in itertools.chain(["build"], sys.stdin):
        request, *count = line.split()
        try:
            answer = getattr(worker, request)(*map(int, count))
        except UsageError as error:
            answer = {"refused": error.message}
        except Exception as error:  # such as memory that is not enough: what was measured before is kept
            traceback.print_exc()
            answer = {"refused": f"{type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else ''}"}
        print(json.dumps(answer), file=answer_to, flush=True)


class Worker:
    """What a side is asked for, by the names of its requests."""

    def __init__(self, options: argparse.Namespace, device: torch.device):
        self.builder = sides_of(options.only[0]).SIDES[options.worker]
        self.size, self.precision, self.device = options.size, options.precision, device
        self.step: Step | None = None

    def build(self) -> dict[str, Any]:
        self.step = self.builder(self.size, self.device, self.precision, False)
        flops, waits = count_flops(self.step), host_waits(self.step, self.device)
        self._forget_peak()
        shown = {"samples": self.step.samples, "unit": self.step.unit}
        return shown | {"tflop_a_step": flops / 1e12, "host_waits": waits}

    def compile(self) -> dict[str, Any]:
        """The same step compiled; where that is refused the eager one stays."""
        devices.require_eager(self.device, "--compile on")
        eager, self.step = self.step, None  # its memory goes before the next is built
        try:
            self.step = self.builder(self.size, self.device, self.precision, True)
        except UsageError:
            self.step = eager
            raise
        del eager
        self._forget_peak()
        return {}

    def steps(self, count: int) -> dict[str, float]:
        return timed(self.step, count, self.device)

    def memory(self) -> dict[str, int]:
        return {"bytes": peak_memory(self.device)}

    def _forget_peak(self) -> None:
        if self.device.type != "cpu":
            torch.get_device_module(self.device).empty_cache()
            torch.get_device_module(self.device).reset_peak_memory_stats(self.device)


def timed(step, count: int, device: torch.device) -> dict[str, float]:
    """Seconds of `count` steps, and the last loss."""
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    devices.synchronize(device)
    began = clock()
    for _ in range(count):
        loss = step.run()
    devices.synchronize(device)
    seconds = clock() - began
    return {"seconds": seconds, "loss": float(loss)}


def count_flops(step) -> int:
    """Of the matrix products and attention of one step: 2 a multiply-add, forward and backward as they are done."""
    with FlopCounterMode(display=False) as counter:
        step.run()
    return counter.get_total_flops()


class HostReads(TorchDispatchMode):
    """Counts values and copies that come from a device to the host, which waits there."""

    def __init__(self, kind: str):
        super().__init__()
        self.kind, self.count = kind, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        source = args[1] if func is torch.ops.aten.copy_.default else args[0] if args else None
        if isinstance(source, torch.Tensor) and source.device.type == self.kind:
            is_copy = isinstance(result, torch.Tensor) and result.device.type == "cpu"
            self.count += is_copy or func is torch.ops.aten._local_scalar_dense.default
        return result


def host_waits(step: Step, device: torch.device) -> int | None:
    """How often the host waits for the device in one eager step, on cuda as CUDA warns; a CPU has none to wait for."""
    if device.type == "cpu":
        return None
    if device.type != "cuda":
        with HostReads(device.type) as reads:
            step.run()
        return reads.count
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            step.run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing" in str(warning.message) for warning in caught)


def peak_memory(device: torch.device) -> int:
    """Bytes allocated on an accelerator at most; on Linux CPUs the resident set, of this process alone."""
    status = Path("/proc/self/status")
    if device.type != "cpu" or not status.exists():
        return devices.peak_memory_bytes(device)
    # VmHWM and not ru_maxrss, which begins with the parent's
    return int(re.search(r"VmHWM:\s+(\d+) kB", status.read_text()).group(1)) << 10


def matmul_peak(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP per second of the best square `torch.mm`; on a CPU per CPU second at one thread."""
    if device.type == "cpu":
        return gemm_peak(dtype, seconds=1.0)
    best = 0.0
    for size in MATMUL_SIZES:
        left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
        for repeats in (3, 20):  # the first is warm-up
            devices.synchronize(device)
            began = time.perf_counter()
            for _ in range(repeats):
                torch.mm(left, right)
            devices.synchronize(device)
            seconds = (time.perf_counter() - began) / repeats
        best = max(best, 2 * size**3 / seconds)
        if seconds > LONG_MATMUL_S:
            break
    return best


def compare(sides: dict[str, Side], options: argparse.Namespace, peaks: Peaks, end: float) -> dict[str, Any]:
    """All sides by turns, `rounds` blocks of `steps` each, or fewer (but two) where `end` comes before.

    Returns:
        Of each peer its ratio to ours, and both sides' numbers.

    Raises:
        UsageError: of our side's first step. A peer's is in the place of its result.
    """
    for side in sides.values():
        side.tell("steps 1")  # those that compile do so at once
    first, failed = {}, {}
    for name, side in sides.items():
        try:
            first[name] = side.answer()["seconds"]
        except UsageError as error:
            failed[name] = error
    if "ours" in failed:
        raise failed["ours"]
    sides = {name: sides[name] for name in first}
    for side in sides.values():
        side.ask(f"steps {options.warmup}")
    blocks: dict[str, list[float]] = {name: [] for name in sides}
    for index in range(options.rounds):
        if index > 1 and time.monotonic() > end:
            break
        for name in list(sides) if index % 2 == 0 else reversed(sides):
            blocks[name].append(sides[name].ask(f"steps {options.steps}")["seconds"] / options.steps)
    found = {name: numbers(side, blocks[name], first[name], peaks) for name, side in sides.items()}
    results: dict[str, Any] = {name: {"not_measured": error.message} for name, error in failed.items()}
    for peer in list(sides)[1:]:
        ratios = [theirs / ours for ours, theirs in zip(blocks["ours"], blocks[peer], strict=True)]
        ratio = {"median": statistics.median(ratios), "low": min(ratios), "high": max(ratios)}
        results[peer] = {"peer_over_ours": ratio, "ours": found["ours"], "peer": found[peer]}
    return results


def numbers(side: Side, blocks: list[float], first: float, peaks: Peaks) -> dict[str, Any]:
    """Of one side, from its seconds a step."""
    seconds = statistics.median(blocks)
    rate = side.facts["tflop_a_step"] * 1e12 / seconds
    return {
        "compiled": side.compiled,
        "seconds_a_step": seconds,
        f"{side.facts['unit']}_per_second": side.facts["samples"] / seconds,
        "tflop_a_step": side.facts["tflop_a_step"],
        "share_of_matmul_peak": rate / peaks.measured,
        "mfu": rate / peaks.of_the_card if peaks.of_the_card else None,
        "peak_memory_mib": side.ask("memory")["bytes"] >> 20,
        "host_waits_a_step": side.facts["host_waits"],
        "first_step_s": first,
    }


def measure(project: str, options: argparse.Namespace) -> dict[str, Any]:
    """All peers of a project, eager and then compiled: of a peer that is plain functions ours alone is."""
    device = devices.resolve(options.device)
    torch.set_num_threads(1)
    end = time.monotonic() + options.seconds
    of_the_card, source = (0.0, "") if device.type == "cpu" else utilisation.peak(device, options.precision)
    peaks = Peaks(matmul_peak(device, DTYPES[options.precision]), of_the_card)
    if device.type != "cpu":
        torch.get_device_module(device).empty_cache()
    versus: dict[str, Any] = {}
    with contextlib.ExitStack() as closed:
        sides = {name: Side(project, name, options) for name in sides_of(project).SIDES}
        for side in sides.values():
            closed.callback(side.close)
        for name, side in list(sides.items()):
            try:
                side.facts = side.answer()
            except UsageError as error:
                if name == "ours":
                    raise
                del sides[name]
                say(versus, project, name, {"not_measured": error.message})
        for mode in ("off", "on") if options.compile == "both" else (options.compile,):
            refused = compile_sides(sides) if mode == "on" and time.monotonic() < end else None
            if refused is None and mode == "on" and not sides["ours"].compiled:
                refused = f"the {options.seconds:.0f} s were over"
            try:
                found = {} if refused else compare(sides, options, peaks, end)
            except UsageError as error:
                found, refused = {}, error.message
            for peer in list(sides)[1:]:
                result = found.get(peer, {"not_measured": refused})
                say(versus, project, f"{peer}, torch.compile {mode}", result)
    return {
        "what": f"{PROJECTS[project]} training step, size {options.size}, {options.precision}",
        "device": devices.describe(device),
        "torch": torch.__version__,
        "clock": "CPU seconds at one thread" if device.type == "cpu" else "wall seconds, device synchronised",
        "blocks": {"rounds": options.rounds, "steps": options.steps, "warmup": options.warmup},
        "matmul_peak_tflop_per_second": peaks.measured / 1e12,
        "mfu_peak": f"{of_the_card / 1e12:.4g} TFLOP/s ({source})" if of_the_card else None,
        "versus": versus,
    }


def compile_sides(sides: dict[str, Side]) -> str | None:
    """Has all sides compile that can; why ours cannot, or None."""
    for name, side in sides.items():
        try:
            side.ask("compile")
            side.compiled = True
        except UsageError as error:
            if name == "ours":
                return error.message
    return None


def say(versus: dict[str, Any], project: str, name: str, result: dict[str, Any]) -> None:
    """Keeps a result and prints its line."""
    versus[name] = result
    if "not_measured" in result:
        print(f"{project} {name}: not measured: {result['not_measured']}", file=sys.stderr, flush=True)
        return
    ratio = result["peer_over_ours"]
    print(f"{project} {name}: {ratio['median']:.3f} ({ratio['low']:.3f} to {ratio['high']:.3f})", flush=True)


def folder_name(device: torch.device) -> str:
    """`cpu`, or the accelerator's name as a folder's, e.g. nvidia-h200."""
    return "cpu" if device.type == "cpu" else re.sub(r"[^a-z0-9]+", "-", devices.describe(device).lower()).strip("-")


@print_usage_errors
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto", choices=devices.DEVICES)
    parser.add_argument("--only", nargs="+", default=list(PROJECTS), choices=list(PROJECTS), help="projects")
    parser.add_argument("--precision", choices=list(DTYPES), default="bf16")
    parser.add_argument("--size", choices=("full", "cpu", "tiny"), default="full", help="base models at an "
                        "accelerator's or a CPU core's batch size; or tiny ones, for a look")  # fmt: skip
    parser.add_argument("--compile", choices=("off", "on", "both"), default="both")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--steps", type=int, default=10, help="steps a block")
    parser.add_argument("--warmup", type=int, default=5, help="steps before the first block")
    parser.add_argument("--seconds", type=float, default=math.inf, help="for a project: what would begin later is left")
    parser.add_argument("--output_dir", type=Path, help="default: ci/baselines/<device>")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.worker:
        return work(options)
    folder = options.output_dir or ROOT / "ci" / "baselines" / folder_name(devices.resolve(options.device))
    folder.mkdir(parents=True, exist_ok=True)
    for project in options.only:
        path = folder / f"device_step_{project}_{options.precision}.json"
        path.write_text(json.dumps(measure(project, options), indent=1) + "\n")
        print(path, flush=True)


if __name__ == "__main__":
    main()
