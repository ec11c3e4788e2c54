"""Twenty steps of every project on this device, beside what a CPU gave, in one report to paste into an issue.

    python -m ci.first_run --device npu                 # doctor, then every project in fp32, bf16 and fp16
    python -m ci.first_run --device cuda --project ViT --precision fp32
    python -m ci.first_run --device cpu --store         # the curves that others are compared with
    python -m ci.first_run --device npu --store         # and this card's own, which later runs on it must repeat

All runs are deterministic (DETERMINISTIC=1). A card without stored curves (ci/baselines/losses/<device>/) is compared
with the CPU's, up to rounding; one that has them must repeat them. The first precision's runs are profiled as well
(--profile): what the host waits for, and where the time goes. MFU is over a data sheet's peak, or over a matrix product
measured here (common/run/utilisation.py). The report is Markdown, on stdout and in ci/reports/; it
ends in words about what is wrong first. Exit code: 0 nothing is wrong, 1 something is, 2 a wrong command line.
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
from pathlib import Path

from ci.first_run.report import Run, page
from ci.gates import machine
from ci.gates.losses import loss_files
from ci.training_cases import CASES, COUNTED, ROOT, short_names
from common import device as devices
from common.device import DEVICES, PRECISIONS
from common.errors import UsageError
from common.run import result_file

CURVES = ROOT / "ci" / "baselines" / "losses"
REPORTS = ROOT / "ci" / "reports"
STEPS = 20
# Largest mean relative difference from the CPU's fp32 losses. data2vec and CLIP's text tower drop activations, and no
# two kinds of device draw alike; the others are the same numbers up to rounding.
LIMITS = {"fp32": 0.002, "bf16": 0.02, "fp16": 0.02}
DRAWS_DROPOUT = {"Data2vec_for_PyTorch": 0.08, "CLIP_for_PyTorch": 0.03}
REPEATS = 1e-6  # likewise from a device's own stored losses, which have six digits


def train(project: str, precision: str, device: str, data: Path, folder: Path, profile: bool = False) -> Run:
    """Runs the entry script in a process of its own and reads what it left."""
    case, run = CASES[project], Run(project, precision)
    output = folder / f"{project}-{precision}"
    more = ("--log_every", "1", "--max_steps", str(STEPS), "--seed", "1", *(["--profile"] if profile else []))
    command = [sys.executable, f"{case.entry}.py", *case.command(data, COUNTED, output, device, precision, *more)]
    environment = {**os.environ, "DETERMINISTIC": "1"}
    done = subprocess.run(command, cwd=ROOT / project, env=environment, capture_output=True, text=True)
    if done.returncode:
        said = (done.stderr.strip() or done.stdout.strip() or "no output").splitlines()
        run.problem = f"exit code {done.returncode}: {said[-1][:300]}"
        return run
    run.losses = tuple(loss_files.read(output).losses.values())
    result = result_file.read(next(output.glob("*_perf.log")))
    run.fps, run.memory = result.get("ActualFPS", ""), result.get("PeakMemoryMiB", "")
    run.step_ms, run.mfu, run.peak = (result.get(key, "") for key in ("StepTimeMs", "MFU", "MFUPeak"))
    page = output / "profile" / "summary.txt"
    run.profile = page.read_text(encoding="utf-8") if page.is_file() else ""
    return run


def compare(run: Run, own: str) -> None:
    """Sets the gap to the stored curve, and the problem where it is too large.

    Args:
        own: folder of this device's curves.
    """
    curves = {}
    for folder in (own, "cpu"):
        stored = CURVES / folder / f"{run.project}.json"
        curves = json.loads(stored.read_text())["losses"] if stored.is_file() else {}
        if folder == "cpu" or run.precision in curves:
            break
    reference = curves.get(run.precision) or curves.get("fp32")
    if not run.losses or reference is None:
        return
    if folder == own and folder != "cpu":
        run.reference = "its own"
    run.gap = statistics.mean(abs(a - b) / abs(b) for a, b in zip(run.losses, reference, strict=True))
    limit = max(LIMITS[run.precision], DRAWS_DROPOUT.get(run.project, 0.0))
    if run.reference == "its own":
        limit = REPEATS
    if run.gap > limit:
        first = next(n for n, (a, b) in enumerate(zip(run.losses, reference, strict=True), 1) if abs(a / b - 1) > limit)
        run.problem = (
            f"losses are {100 * run.gap:.2g} % away from {run.reference}'s (limit {100 * limit:g} %), "
            f"from step {first} on"
        )


def store(runs: list[Run], own: str) -> None:
    """Keeps the losses of this device: of a CPU the fp32 ones, which are what all others are compared with."""
    for run in runs:
        if run.losses and (run.precision == "fp32" or own != "cpu"):
            path = CURVES / own / f"{run.project}.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            known = json.loads(path.read_text())["losses"] if path.is_file() else {}
            known[run.precision] = [round(loss, 6) for loss in run.losses]
            path.write_text(json.dumps({"steps": STEPS, "losses": known}, indent=1) + "\n")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m ci.first_run", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=DEVICES, default="auto", help="default: the accelerator that is there")
    parser.add_argument("--project", nargs="+", help="ViT, Beit2, CLIP, Data2vec; default: all")
    parser.add_argument(
        "--precision",
        nargs="+",
        choices=PRECISIONS,
        default=list(PRECISIONS),
        help="default: all; the first is profiled",
    )
    parser.add_argument("--store", action="store_true", help="keep these losses as what others are compared with")
    options = parser.parse_args(argv)
    try:
        projects = short_names(options.project)
    except ValueError as error:
        parser.error(str(error))
    try:
        own = machine.folder_name(devices.resolve(options.device).type)
    except UsageError as error:
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
                profile = precision == options.precision[0]
                runs.append(train(project, precision, options.device, data, Path(name), profile))
                if not options.store:
                    compare(runs[-1], own)
    if options.store:
        store(runs, own)
    head = f"{STEPS} steps of each project's small case, {time.perf_counter() - began:.0f} s in all"
    text = page(options.device, head, doctor.stdout + doctor.stderr, doctor.returncode != 0, runs)
    REPORTS.mkdir(parents=True, exist_ok=True)
    path = REPORTS / f"first_run-{options.device}.md"
    path.write_text(text, encoding="utf-8")
    print(f"{text}\nreport: {path}")
    return int(doctor.returncode != 0 or any(run.problem for run in runs))


if __name__ == "__main__":
    sys.exit(main())
