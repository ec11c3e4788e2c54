"""All side-by-side benchmarks, one after the other, each in a process of its own.

    python -m ci.peers                        # all on this CPU: results to ci/baselines/cpu, tables rewritten
    python -m ci.peers --only vit_step clip   # those whose name begins so
    python -m ci.peers --quick                # one round each, to see that they run; nothing kept is changed
    python -m ci.peers --device cuda          # the step benchmarks of an accelerator, to ci/baselines/<device>
    python -m ci.peers --table                # only rewrite the Markdown tables from the results kept

Numbers are CPU seconds at one thread, ours and the peer by turns (an accelerator: synchronised wall seconds). The exit
status is 1 when a benchmark failed; the others still run.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from ci.peers import ROOT, table
from common.device import DEVICES
from common.errors import UsageError, print_usage_errors

PROJECTS = ("vit", "beit2", "clip", "data2vec")


@dataclass(frozen=True)
class Benchmark:
    """A module of ci/peers with its options; `takes_rounds` when it has `--rounds`."""

    name: str
    module: str
    options: tuple[str, ...] = ()
    takes_rounds: bool = True
    quick: tuple[str, ...] = ()  # options that make it short


CPU_BENCHMARKS = (
    Benchmark("vit_step", "vit_step"),
    Benchmark("vit_input", "vit_input"),
    Benchmark("beit2_step_fp32", "beit2_step", ("--precision", "fp32")),
    # bf16 is small and short: the peers' bf16 products take minutes a step on CPUs without bf16 instructions
    Benchmark("beit2_step_bf16", "beit2_step", ("--precision", "bf16", "--batch", "1", "--rounds", "1")),
    Benchmark("beit2_data", "beit2_data"),
    Benchmark("clip_step_upstream", "clip_step", ("--case", "upstream")),
    Benchmark("clip_step_open_clip", "clip_step", ("--case", "open_clip")),
    Benchmark("clip_step_bf16", "clip_step", ("--case", "bf16")),
    Benchmark("clip_step_bf16_upstream", "clip_step", ("--case", "bf16_upstream", "--rounds", "1")),
    Benchmark("clip_input", "clip_input"),
    Benchmark("clip_index", "clip_index", takes_rounds=False, quick=("--pairs", "3000", "--pictures", "1000")),
    Benchmark("clip_loss", "clip_loss", quick=("--largest", "4096")),
    Benchmark("data2vec_step_fp32", "data2vec_step", ("--precision", "fp32")),
    Benchmark(
        "data2vec_step_bf16",
        "data2vec_step",
        ("--precision", "bf16", "--rows", "1", "--tokens", "128", "--rounds", "1"),
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


def device_benchmarks(device: str) -> tuple[Benchmark, ...]:
    return tuple(
        Benchmark(f"{project}_{precision}", "device_step", ("--device", device, "--only", project)
                  + ("--precision", precision))
        for project in PROJECTS
        for precision in ("bf16", "fp32")
    )  # fmt: skip


def chosen(benchmarks: tuple[Benchmark, ...], prefixes: list[str]) -> list[Benchmark]:
    """Those whose name begins with one of the prefixes; all without any."""
    for prefix in prefixes:
        if not any(benchmark.name.startswith(prefix) for benchmark in benchmarks):
            names = ", ".join(benchmark.name for benchmark in benchmarks)
            raise UsageError(f"--only {prefix}: no benchmark's name begins so; there are {names}")
    return [b for b in benchmarks if not prefixes or b.name.startswith(tuple(prefixes))]


def run(benchmark: Benchmark, rounds: int | None, output_dir: Path | None) -> bool:
    """Whether it ended well; what it prints goes through."""
    command = [sys.executable, "-m", f"ci.peers.{benchmark.module}", *benchmark.options]
    if rounds is not None and benchmark.takes_rounds:
        command += ["--rounds", str(rounds)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    if output_dir is not None:
        environment["PEERS_OUTPUT_DIR"] = str(output_dir)
        command += [*benchmark.quick]
        command += ["--output_dir", str(output_dir)] if benchmark.module == "device_step" else []
    print(f"\n== {benchmark.name}: {' '.join(command[1:])}", flush=True)
    began = time.perf_counter()
    status = subprocess.run(command, cwd=ROOT, env=environment).returncode
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
    parser.add_argument("--quick", action="store_true", help="one round; results to a temporary folder")
    parser.add_argument("--list", action="store_true", help="print the names")
    parser.add_argument("--table", action="store_true", help="only rewrite the tables")
    options = parser.parse_args(argv)
    benchmarks = chosen(CPU_BENCHMARKS if options.device == "cpu" else device_benchmarks(options.device), options.only)
    if options.list:
        print("\n".join(benchmark.name for benchmark in benchmarks))
        return 0
    failed = []
    if not options.table:
        with tempfile.TemporaryDirectory() as temporary:
            kept_in = Path(temporary) if options.quick else None
            rounds = options.rounds or (1 if options.quick else None)
            failed = [benchmark.name for benchmark in benchmarks if not run(benchmark, rounds, kept_in)]
    if not options.quick:
        for path in table.rewrite():
            print(f"rewrote the table in {path.relative_to(ROOT)}")
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
