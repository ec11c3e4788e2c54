"""Twenty steps of every project on this device, beside what a CPU gave, in one report to paste into an issue.

    python -m ci.first_run --device npu                 # doctor, then every project in fp32, bf16 and fp16
    python -m ci.first_run --device cuda --project ViT --precision fp32
    python -m ci.first_run --device cpu --store         # the curves that others are compared with

The report is Markdown, on stdout and in ci/reports/; it ends in words about what is wrong first. Exit code: 0 nothing
is wrong, 1 something is, 2 a wrong command line.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from ci.gates.losses import loss_files
from ci.training_cases import CASES, COUNTED, ROOT, short_names
from common import result_file
from common.device import DEVICES, PRECISIONS

CURVES = ROOT / "ci" / "baselines" / "losses" / "cpu"
REPORTS = ROOT / "ci" / "reports"
STEPS = 20
# Largest mean relative difference from the CPU's fp32 losses. data2vec drops activations, and no two kinds of device
# draw alike; the others are the same numbers up to rounding.
LIMITS = {"fp32": 0.002, "bf16": 0.02, "fp16": 0.02}
DRAWS_DROPOUT = {"Data2vec_for_PyTorch": 0.08}


@dataclass
class Run:
    """What twenty steps of one project in one precision came to."""

    project: str
    precision: str
    problem: str = ""
    losses: tuple[float, ...] = ()
    gap: float | None = None
    fps: str = ""
    memory: str = ""


def train(project: str, precision: str, device: str, data: Path, folder: Path) -> Run:
    """Runs the entry script in a process of its own and reads what it left."""
    case, run = CASES[project], Run(project, precision)
    output = folder / f"{project}-{precision}"
    more = ("--log_every", "1", "--max_steps", str(STEPS), "--seed", "1")
    command = [sys.executable, f"{case.entry}.py", *case.command(data, COUNTED, output, device, precision, *more)]
    done = subprocess.run(command, cwd=ROOT / project, capture_output=True, text=True)
    if done.returncode:
        said = (done.stderr.strip() or done.stdout.strip() or "no output").splitlines()
        run.problem = f"exit code {done.returncode}: {said[-1][:300]}"
        return run
    run.losses = tuple(loss_files.read(output).losses.values())
    result = result_file.read(next(output.glob("*_perf.log")))
    run.fps, run.memory = result.get("ActualFPS", ""), result.get("PeakMemoryMiB", "")
    return run


def compare(run: Run) -> None:
    """Sets the gap to the stored curve, and the problem where it is too large."""
    stored = CURVES / f"{run.project}.json"
    if not run.losses or not stored.is_file():
        return
    reference = json.loads(stored.read_text())["losses"]
    run.gap = statistics.mean(abs(a - b) / abs(b) for a, b in zip(run.losses, reference, strict=True))
    limit = max(LIMITS[run.precision], DRAWS_DROPOUT.get(run.project, 0.0))
    if run.gap > limit:
        first = next(n for n, (a, b) in enumerate(zip(run.losses, reference, strict=True), 1) if abs(a / b - 1) > limit)
        run.problem = (
            f"losses are {100 * run.gap:.2f} % away from the CPU's (limit {100 * limit:g} %), from step {first} on"
        )


def advice(runs: list[Run], doctor_failed: bool) -> str:
    """What to look at first, in the order in which causes lie behind one another."""
    bad = [run for run in runs if run.problem]
    if doctor_failed:
        return "Start with the first line that the doctor calls wrong: what follows may come from it."
    if not bad:
        return "Nothing is wrong: every run ended, and its losses are the CPU's within the limits above."
    crashed = [run for run in bad if not run.losses]
    if crashed:
        run = crashed[0]
        return (
            f"Start with {run.project} in {run.precision}: {run.problem}. NPU_PRESET=debug names the line that failed."
        )
    names = {run.project for run in bad}
    if len(names) > 1 or any(run.precision == "fp32" for run in bad):
        run = next((run for run in bad if run.precision == "fp32"), bad[0])
        return (
            f"Start with {run.project} in {run.precision}: {run.problem}. Leave the device's patches out one by one "
            "(NPU_PATCHES_OFF=NAME) and compare again with `python -m ci.gates.losses`."
        )
    return (
        f"Only half precision differs, in {', '.join(sorted(names))}: compare fp16 with bf16; look at the loss scale."
    )


def report(device: str, doctor: str, runs: list[Run], seconds: float, doctor_failed: bool) -> str:
    """The page."""
    lines = [f"# First run on {device}", "", "```", doctor.strip(), "```", ""]
    lines += [f"{STEPS} steps of each project's small case, {seconds:.0f} s in all. Losses beside a CPU's in fp32.", ""]
    lines += ["| project | precision | first, last loss | from the CPU's | samples/s | memory, MiB | problem |"]
    lines += ["|---|---|---|---|---|---|---|"]
    for run in runs:
        ends = f"{run.losses[0]:.4f}, {run.losses[-1]:.4f}" if run.losses else ""
        gap = "" if run.gap is None else f"{100 * run.gap:.3f} %"
        lines.append(
            f"| {run.project} | {run.precision} | {ends} | {gap} | {run.fps} | {run.memory} | {run.problem or 'none'} |"
        )
    return "\n".join([*lines, "", f"**{advice(runs, doctor_failed)}**", ""])


def store(runs: list[Run]) -> None:
    """Keeps the fp32 losses of this CPU as the reference."""
    CURVES.mkdir(parents=True, exist_ok=True)
    for run in runs:
        if run.precision == "fp32" and run.losses:
            text = json.dumps({"steps": STEPS, "losses": [round(loss, 6) for loss in run.losses]}, indent=1)
            (CURVES / f"{run.project}.json").write_text(text + "\n")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m ci.first_run", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=DEVICES, default="auto")
    parser.add_argument("--project", nargs="+", help="ViT, Beit2, CLIP, Data2vec; default: all")
    parser.add_argument("--precision", nargs="+", choices=PRECISIONS, default=list(PRECISIONS))
    parser.add_argument("--store", action="store_true", help="keep these losses as what others are compared with")
    options = parser.parse_args(argv)
    try:
        projects = short_names(options.project)
    except ValueError as error:
        parser.error(str(error))
    began, runs = time.perf_counter(), []
    print("doctor ...", file=sys.stderr, flush=True)
    command = [sys.executable, "-m", "common.doctor", "--device", options.device]
    doctor = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ)
    with tempfile.TemporaryDirectory() as name:
        for project in projects:
            data = Path(name) / project / "data"
            data.mkdir(parents=True)
            CASES[project].prepare(data, COUNTED)
            for precision in options.precision:
                print(f"{project} {precision} ...", file=sys.stderr, flush=True)
                runs.append(train(project, precision, options.device, data, Path(name)))
                if not options.store:
                    compare(runs[-1])
    if options.store:
        store(runs)
    text = report(
        options.device, doctor.stdout + doctor.stderr, runs, time.perf_counter() - began, doctor.returncode != 0
    )
    REPORTS.mkdir(parents=True, exist_ok=True)
    path = REPORTS / f"first_run-{options.device}.md"
    path.write_text(text, encoding="utf-8")
    print(f"{text}\nreport: {path}")
    return int(doctor.returncode != 0 or any(run.problem for run in runs))


if __name__ == "__main__":
    sys.exit(main())
