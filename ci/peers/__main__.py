"""All side-by-side benchmarks, one after the other, each in a process of its own.

    python -m ci.peers                        # all on this CPU: results to ci/baselines/cpu, tables rewritten
    python -m ci.peers --only vit_step clip   # those whose name begins so
    python -m ci.peers --quick                # one round each, to see that they run; nothing kept is changed
    python -m ci.peers --device cuda          # the steps on an accelerator: 8 minutes, to ci/baselines/<device>
    python -m ci.peers --device cpu --size tiny --output_dir OUT       # these on tiny models, to see that they run
    python -m ci.peers --table                # only rewrite the Markdown tables from the results kept

Numbers are CPU seconds at one thread, ours and the peer by turns (an accelerator: synchronised wall seconds). The exit
status is 1 when a benchmark failed; the others still run.
"""

from __future__ import annotations

import argparse
import math
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from ci.peers import ROOT, table
from common.cpu import has_bf16_instructions
from common.device import DEVICES
from common.errors import UsageError, print_usage_errors

MINUTES = 8.0  # of an accelerator
GRACE_S, TIMED_OUT = 60.0, 124
PROJECTS = ("vit", "beit2", "clip", "data2vec")


@dataclass(frozen=True)
class Benchmark:
    """A module of ci/peers with its options; `takes_rounds` when it has `--rounds`."""

    name: str
    module: str
    options: tuple[str, ...] = ()
    takes_rounds: bool = True
    quick: tuple[str, ...] = ()  # options that make it short


def without_bf16(*options: str) -> tuple[str, ...]:
    """Options for CPUs without bf16 instructions, on which the peers' bf16 products take minutes a step."""
    return () if has_bf16_instructions() else options


CPU_BENCHMARKS = (
    Benchmark("vit_step", "vit_step"),
    Benchmark("vit_input", "vit_input"),
    Benchmark("bf16_block", "bf16_block"),
    Benchmark("checkpoint_stall", "checkpoint_stall", quick=("--model", "vit_demo")),
    Benchmark("beit2_step_fp32", "beit2_step", ("--precision", "fp32")),
    Benchmark("beit2_step_bf16", "beit2_step", ("--precision", "bf16", *without_bf16("--batch", "1", "--rounds", "1"))),
    Benchmark("beit2_data", "beit2_data"),
    Benchmark("clip_step_upstream", "clip_step", ("--case", "upstream")),
    Benchmark("clip_step_open_clip", "clip_step", ("--case", "open_clip")),
    Benchmark("clip_step_bf16", "clip_step", ("--case", "bf16")),
    Benchmark("clip_step_bf16_upstream", "clip_step", ("--case", "bf16_upstream", *without_bf16("--rounds", "1"))),
    Benchmark("clip_input", "clip_input"),
    Benchmark("clip_index", "clip_index", takes_rounds=False, quick=("--pairs", "3000", "--pictures", "1000")),
    Benchmark("clip_loss", "clip_loss", quick=("--largest", "4096")),
    Benchmark("data2vec_step_fp32", "data2vec_step", ("--precision", "fp32")),
    Benchmark(
        "data2vec_step_bf16",
        "data2vec_step",
        ("--precision", "bf16", *without_bf16("--rows", "1", "--tokens", "128", "--rounds", "1")),
    ),
    Benchmark("data2vec_preprocess", "data2vec_preprocess"),
    *(
        Benchmark(
            f"{project}_memory",
            "device_step",
            ("--device", "cpu", "--size", "cpu", "--precision", "fp32", "--compile", "off", "--only", project)
            + ("--steps", "1", "--warmup", "1"),
        )
        for project in PROJECTS
    ),
)


def device_benchmarks(device: str, size: str) -> tuple[Benchmark, ...]:
    """The steps of all projects, bf16 first: what the time is not enough for is left."""
    return tuple(
        Benchmark(f"{project}_{precision}", "device_step", ("--device", device, "--only", project)
                  + ("--precision", precision, "--size", size), quick=("--steps", "2", "--warmup", "1"))
        for precision in ("bf16", "fp32")
        for project in PROJECTS
    )  # fmt: skip


def chosen(benchmarks: tuple[Benchmark, ...], prefixes: list[str]) -> list[Benchmark]:
    """Those whose name begins with one of the prefixes; all without any."""
    for prefix in prefixes:
        if not any(benchmark.name.startswith(prefix) for benchmark in benchmarks):
            names = ", ".join(benchmark.name for benchmark in benchmarks)
            raise UsageError(f"--only {prefix}: no benchmark's name begins so; there are {names}")
    return [b for b in benchmarks if not prefixes or b.name.startswith(tuple(prefixes))]


def run(benchmark: Benchmark, options: argparse.Namespace, output_dir: Path | None, seconds: float) -> bool:
    """Whether it ended well, within `seconds`; what it prints goes through."""
    command = [sys.executable, "-m", f"ci.peers.{benchmark.module}", *benchmark.options]
    rounds = options.rounds or (1 if options.quick else None)
    if rounds is not None and benchmark.takes_rounds:
        command += ["--rounds", str(rounds)]
    if benchmark.module == "device_step" and math.isfinite(seconds):
        command += ["--seconds", f"{seconds:.0f}"]
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    if output_dir is not None:
        environment["PEERS_OUTPUT_DIR"] = str(output_dir)
        command += benchmark.quick if options.quick else ()
        command += ["--output_dir", str(output_dir)] if benchmark.module == "device_step" else []
    print(f"\n== {benchmark.name}: {' '.join(command[1:])}", flush=True)
    began = time.perf_counter()
    try:
        limit = seconds + GRACE_S if math.isfinite(seconds) else None
        status = subprocess.run(command, cwd=ROOT, env=environment, timeout=limit).returncode
    except subprocess.TimeoutExpired:
        status = TIMED_OUT
    print(f"== {benchmark.name}: exit {status} after {time.perf_counter() - began:.0f} s", flush=True)
    return status == 0


@print_usage_errors
def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m ci.peers", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cpu", choices=DEVICES)
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="names of benchmarks, or how they begin")
    parser.add_argument("--rounds", type=int, help="over each benchmark's own number of rounds")
    parser.add_argument("--size", choices=("full", "cpu", "tiny"), help="of an accelerator's steps; measures them on a "
                        "CPU as well")  # fmt: skip
    parser.add_argument("--minutes", type=float, help="what would begin later is left; an accelerator's default: 8")
    parser.add_argument("--output_dir", type=Path, help="for the results; the tables stay as they are")
    parser.add_argument("--quick", action="store_true", help="one round; results to a temporary folder")
    parser.add_argument("--list", action="store_true", help="print the names")
    parser.add_argument("--table", action="store_true", help="only rewrite the tables")
    options = parser.parse_args(argv)
    steps = options.size is not None or options.device != "cpu"
    found = device_benchmarks(options.device, options.size or "full") if steps else CPU_BENCHMARKS
    benchmarks = chosen(found, options.only)
    if options.list:
        print("\n".join(benchmark.name for benchmark in benchmarks))
        return 0
    failed = []
    if not options.table:
        with tempfile.TemporaryDirectory() as temporary:
            kept_in = options.output_dir or (Path(temporary) if options.quick else None)
            end = time.monotonic() + 60 * (options.minutes or (MINUTES if steps and not options.quick else math.inf))
            for number, benchmark in enumerate(benchmarks):
                # an even share of the time that is left: a slow one must not take all
                left = max(0.0, end - time.monotonic()) / (len(benchmarks) - number)
                if not run(benchmark, options, kept_in, left):
                    failed.append(benchmark.name)
    if not (options.quick or options.output_dir):
        for path in table.rewrite():
            print(f"rewrote the table in {path.relative_to(ROOT)}")
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
