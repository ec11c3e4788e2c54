"""Training steps of the projects against their peers on one device: cuda, npu or cpu.

    python -m ci.peers.device_step --device cuda                    # all projects, bf16, eager and torch.compile
    python -m ci.peers.device_step --device cpu --size cpu --precision fp32 --only beit2
    python -m ci.peers.device_step --device cpu --size tiny --output_dir /tmp/steps

Each side runs in a process of its own, and ours and a peer work by turns. A block of steps is timed with the device
synchronised at both ends, after warm-up (and compilation): wall seconds on an accelerator, CPU seconds on a CPU. Beside
the rate stand the matrix-product FLOPs of that side's own step as a share of the best rate of a bf16 (fp32) matmul
measured on the same device in the same run, and the peak memory. Batches are on the device beforehand: this measures
the step, not the input pipeline. Results: ci/baselines/<device>/device_step_<project>_<precision>.json.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from ci.peers import ROOT
from ci.peers.paired_timing import gemm_peak
from ci.peers.steps.step import PROJECTS, sides_of
from common import device as devices
from common.errors import UsageError, print_usage_errors

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
MATMUL_SIZES = (512, 2048, 4096, 8192)
LONG_MATMUL_S = 1e-3  # a product that takes this long has shown the device's peak: larger ones add nothing


class Side:
    """A process that holds one side's model and does blocks of steps when told to."""

    def __init__(self, project: str, name: str, options: argparse.Namespace, compiled: bool):
        command = [sys.executable, "-m", "ci.peers.device_step", "--only", project, "--worker", name]
        command += ["--device", options.device, "--precision", options.precision, "--size", options.size]
        command += ["--compile", "on" if compiled else "off"]
        self.process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.facts = self._answer()

    def ask(self, request: str) -> dict[str, Any]:
        self.process.stdin.write(request + "\n")
        self.process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        line = self.process.stdout.readline()
        if not line:
            raise UsageError(f"a side ended before it answered (exit {self.process.wait()}): its message is above")
        answer = json.loads(line)
        if "refused" in answer:
            self.process.wait()
            raise UsageError(answer["refused"])
        return answer

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()

    def __enter__(self) -> Side:
        return self

    def __exit__(self, *_) -> None:
        self.close()


def work(options: argparse.Namespace) -> None:
    """The body of a side's process: answers `steps N` with seconds and loss, `memory` with bytes, on stdout."""
    device = devices.resolve(options.device)
    torch.set_num_threads(1)
    answer_to = sys.stdout
    sys.stdout = sys.stderr  # libraries that print must not break the answers
    builder = sides_of(options.only[0]).SIDES[options.worker]
    try:
        step = builder(options.size, device, options.precision, False)
        flops = count_flops(step)
        if options.compile == "on":
            step = None  # its memory goes before the next is built
            step = builder(options.size, device, options.precision, True)
    except UsageError as error:
        print(json.dumps({"refused": error.message}), file=answer_to, flush=True)
        return
    if device.type != "cpu":
        torch.get_device_module(device).reset_peak_memory_stats(device)
    facts = {"samples": step.samples, "unit": step.unit, "tflop_a_step": flops / 1e12}
    print(json.dumps(facts), file=answer_to, flush=True)
    for line in sys.stdin:
        request, *count = line.split()
        if request == "memory":
            answer = {"bytes": peak_memory(device)}
        else:
            answer = timed(step, int(count[0]), device)
        print(json.dumps(answer), file=answer_to, flush=True)


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


def compare(
    project: str, peer: str, options: argparse.Namespace, ours_compiled: bool, peer_compiled: bool, peak: float
) -> dict[str, Any]:
    """Ours and a peer by turns, `rounds` blocks of `steps` each."""
    with Side(project, "ours", options, ours_compiled) as a, Side(project, peer, options, peer_compiled) as b:
        sides = (a, b)
        first = [side.ask("steps 1") for side in sides]  # compilation, too
        for side in sides:
            side.ask(f"steps {options.warmup}")
        blocks: list[list[float]] = [[], []]
        for index in range(options.rounds):
            for side in (0, 1) if index % 2 == 0 else (1, 0):
                blocks[side].append(sides[side].ask(f"steps {options.steps}")["seconds"] / options.steps)
        memory = [side.ask("memory")["bytes"] for side in sides]
        facts = [side.facts for side in sides]
    ratios = [theirs / ours for ours, theirs in zip(*blocks, strict=True)]
    result: dict[str, Any] = {
        "peer_over_ours": {"median": statistics.median(ratios), "low": min(ratios), "high": max(ratios)}
    }
    for index, (name, compiled) in enumerate((("ours", ours_compiled), ("peer", peer_compiled))):
        seconds = statistics.median(blocks[index])
        result[name] = {
            "compiled": compiled,
            "seconds_a_step": seconds,
            f"{facts[index]['unit']}_per_second": facts[index]["samples"] / seconds,
            "tflop_a_step": facts[index]["tflop_a_step"],
            "share_of_matmul_peak": facts[index]["tflop_a_step"] * 1e12 / seconds / peak,
            "peak_memory_mib": memory[index] >> 20,
            "first_step_s": first[index]["seconds"],
        }
    return result


def measure(project: str, options: argparse.Namespace) -> dict[str, Any]:
    """All peers of a project; with torch.compile on both sides, or on ours alone where the peer is plain functions."""
    device = devices.resolve(options.device)
    torch.set_num_threads(1)
    peak = matmul_peak(device, DTYPES[options.precision])
    if device.type != "cpu":
        torch.get_device_module(device).empty_cache()
    result: dict[str, Any] = {
        "what": f"{PROJECTS[project]} training step, size {options.size}, {options.precision}",
        "device": devices.describe(device),
        "torch": torch.__version__,
        "clock": "CPU seconds at one thread" if device.type == "cpu" else "wall seconds, device synchronised",
        "blocks": {"rounds": options.rounds, "steps": options.steps, "warmup": options.warmup},
        "matmul_peak_tflop_per_second": peak / 1e12,
        "versus": {},
    }
    modes = {"off": [(False, False)], "on": [(True, True)], "both": [(False, False), (True, True)]}[options.compile]
    for peer, compiled in itertools.product([s for s in sides_of(project).SIDES if s != "ours"], modes):
        if compiled[1] and peer == "plain":
            compiled = (True, False)
        name = f"{peer}, torch.compile {'on' if compiled[0] else 'off'}"
        try:
            result["versus"][name] = compare(project, peer, options, *compiled, peak)
        except UsageError as error:
            print(f"{project} {name}: not measured: {error.message}", file=sys.stderr, flush=True)
            result["versus"][name] = {"not_measured": error.message}
            continue
        ratio = result["versus"][name]["peer_over_ours"]
        print(f"{project} {name}: {ratio['median']:.3f} ({ratio['low']:.3f} to {ratio['high']:.3f})", flush=True)
    return result


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
