"""The speed of every project as users measure it, against earlier nights on the same device: `make perf-run`.

    python -m ci.gates.nightly                                  # on the accelerator that is there, else the CPU
    python -m ci.gates.nightly --update                         # and add tonight's speeds to ci/baselines/<device>/
    python -m ci.gates.nightly --device npu --data ViT=/data/imageNet-1k --data CLIP=/data/coco

Runs test/train_performance_1p.sh of each project, and the _8p.sh where eight cards are, on the sample data (or on
--data), and reads the result files. On a CPU the models are small ones. A speed is compared with the median of the last
ten nights of the same device, driver, CANN, torch, batch, precision and number of ranks. Wall time of a CPU that others
share judges nothing: there SLOWER is shown and not red; `make perf` compares revisions on any host.

Exit code: 0 all right or nothing to compare with yet, 1 slower or failed, 3 slower on a CPU.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch

from ci.gates import machine, revisions
from ci.gates.nightly import series as perf_series
from ci.training_cases import run_script, sentences, short_names
from common import device as devices
from common.errors import UsageError, print_usage_errors
from common.run import result_file

ROOT = revisions.ROOT
REPORTS = ROOT / "ci" / "reports" / "perf_run"
BASELINES = ROOT / "ci" / "baselines"
FAILED = "FAILED"

# Flags of the performance scripts by kind of device; on accelerators the scripts' own models and batches.
SETTINGS: dict[str, dict[str, list[str]]] = {
    "cpu": {
        "ViT_for_PyTorch": ["--config=configs/run_vit_demo.yaml", "--batch_size=64", "--max_steps=60"],
        "Beit2_for_PyTorch": [
            "--model=beit_tiny_patch16_224_8k_vocab_cls_pt", "--tokenizer_model=vqkd_encoder_tiny_decoder_1x192x3_clip",
            "--batch_size=8", "--max_steps=30",
        ],
        "CLIP_for_PyTorch": ["--batch_size=32", "--max_steps=60", "--workers=1"],
        "Data2vec_for_PyTorch": ["--config_name=demo", "--max_steps=60"],
    },
    "accelerator": {
        "ViT_for_PyTorch": ["--batch_size=64", "--max_steps=120"],
        "Beit2_for_PyTorch": ["--batch_size=64", "--max_steps=120"],
        "CLIP_for_PyTorch": ["--batch_size=64", "--max_steps=120"],
        "Data2vec_for_PyTorch": ["--config_name=base", "--max_steps=120"],
    },
}  # fmt: skip
SAMPLE = {"ViT_for_PyTorch": "images", "Beit2_for_PyTorch": "images/train", "CLIP_for_PyTorch": "coco2017"}


@dataclass
class Result:
    """One script's run. `key` is what its speed depends on; numbers are None where the run failed."""

    project: str
    ranks: int
    verdict: str = FAILED
    reason: str = ""
    case: str = ""
    fps: float | None = None
    step_ms: float | None = None
    memory_mib: int | None = None
    key: dict = field(default_factory=dict)
    judged: perf_series.Judgement = field(default_factory=lambda: perf_series.Judgement(FAILED, 0))


def inputs(project: str, kind: str, data: Path | None, sample_data: Path | None, folder: Path) -> list[str]:
    """--data_path, and what else a script must be given; built in `folder` where it is not in the sample data."""
    if project == "Data2vec_for_PyTorch" and data is None:
        data = folder / "corpus"
        if not (data / "dict.txt").exists():
            text = sample_data / "text"
            prefixes = ["--trainpref", text / "train.txt", "--validpref", text / "valid.txt"]
            run_script(project, "preprocess.py", "--only-source", *prefixes, "--destdir", data, "--workers", "2")
    flags = [f"--data_path={data or sample_data / SAMPLE[project]}"]
    if project == "CLIP_for_PyTorch":
        model = folder / f"clip-roberta-{kind}"
        if not (model / "model.safetensors").exists():
            captions = folder / "captions.txt"
            captions.parent.mkdir(parents=True, exist_ok=True)
            captions.write_text("\n".join(sentences(500, longest=16)))
            size = "tiny" if kind == "cpu" else "base"
            arguments = ["--from_scratch", size, "--captions", captions, "--output_dir", model, "--overwrite"]
            run_script(project, "save_clip_roberta.py", *arguments)
        flags.append(f"--model_path={model}")
    return flags


def run_case(
    project: str, ranks: int, device: str, precision: str, settings: list[str], given: list[str], output: Path
) -> Result:
    """Runs a performance script and reads what it measured."""
    result = Result(project, ranks)
    script = ROOT / project / "test" / f"train_performance_{ranks}p.sh"
    fixed = [f"--device={device}", f"--precision={precision}", f"--output_dir={output}"]
    started = time.time()
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}  # scripts call python3
    command = ["bash", script, *given, *settings, *fixed]
    run = subprocess.run(command, cwd=ROOT / project, env=environment, capture_output=True, text=True)
    files = [path for path in output.glob("*_perf.log") if path.stat().st_mtime >= started - 1]
    values = result_file.read(files[0]) if files else {}
    if run.returncode or values.get("Status") != "OK" or "ActualFPS" not in values:
        lines = (run.stderr.strip() or run.stdout.strip() or "no output").splitlines()
        result.reason = f"exit code {run.returncode}; {values.get('Error') or lines[-1].strip()}"
        return result
    result.case, result.fps = values["CaseName"], float(values["ActualFPS"])
    result.step_ms, result.memory_mib = float(values["StepTimeMs"]), int(values["PeakMemoryMiB"])
    result.key = {
        **machine.environment(device),
        "ranks": int(values["RankSize"]),
        "batch": values["BatchSize"],
        "precision": precision,
        "settings": " ".join(settings),
    }
    return result


def judge(result: Result, folder: Path, update: bool) -> None:
    """Sets the verdict from the nights before; with `update` adds this one."""
    if result.fps is None:
        return
    path = folder / f"{result.case}.json"
    result.judged = perf_series.judge(result.fps, perf_series.nights_of(path, result.key))
    result.verdict = result.judged.verdict
    if update:
        commit = revisions.commit_of(revisions.WORKING_TREE)
        night = {"date": time.strftime("%Y-%m-%d"), "commit": commit, "fps": result.fps, "step_ms": result.step_ms}
        perf_series.add_night(path, result.key, night)


COLUMNS = ("project", "ranks", "samples/s", "earlier nights", "change", "allowed", "ms a step", "memory MiB", "verdict")


def cells(result: Result) -> list[str]:
    judged, dash = result.judged, "-"
    change = dash if judged.median is None else f"{result.fps / judged.median - 1:+.1%}"
    return [
        result.project,
        str(result.ranks),
        dash if result.fps is None else f"{result.fps:.2f}",
        dash if judged.median is None else f"{judged.median:.2f} ({judged.nights})",
        change,
        dash if judged.allowed is None else f"-{judged.allowed:.1%}",
        dash if result.step_ms is None else f"{result.step_ms:.1f}",
        dash if result.memory_mib is None else str(result.memory_mib),
        result.verdict + (f": {result.reason}" if result.reason else ""),
    ]


def table(results: list[Result]) -> str:
    """Markdown whose columns also line up as plain text."""
    rows = [list(COLUMNS), *map(cells, results)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(COLUMNS))]
    lines = ["| " + " | ".join(text.ljust(w) for text, w in zip(row, widths, strict=True)) + " |" for row in rows]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)


def write_report(results: list[Result], device: str, folder: Path) -> Path:
    """summary.md and results.json."""
    folder.mkdir(parents=True, exist_ok=True)
    host = {k: v for k, v in machine.environment(device).items() if v}
    text = f"# Speed on {device}\n\n{', '.join(f'{k} {v}' for k, v in host.items())}\n\n{table(results)}\n"
    numbers = [{**vars(result), "judged": vars(result.judged)} for result in results]
    (folder / "results.json").write_text(json.dumps(numbers, indent=1) + "\n")
    path = folder / "summary.md"
    path.write_text(text)
    return path


def exit_code(results: list[Result], device: str) -> int:
    verdicts = [result.verdict for result in results]
    if FAILED in verdicts or (perf_series.SLOWER in verdicts and device != "cpu"):
        return 1
    return 3 if perf_series.SLOWER in verdicts else 0


def read_options(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=devices.DEVICES, default="auto")
    parser.add_argument("--project", nargs="+", help="ViT, Beit2, CLIP, Data2vec; default: all")
    parser.add_argument("--precision", choices=devices.PRECISIONS, help="default: fp32 on a CPU, else bf16")
    parser.add_argument("--data", action="append", default=[], metavar="PROJECT=DIR", help="instead of the sample data")
    parser.add_argument("--ranks", nargs="+", type=int, choices=(1, 8), help="default: 1, and 8 where 8 cards are")
    parser.add_argument("--update", action="store_true", help="add tonight's speeds to the baselines")
    # absolute: the scripts run in their projects' folders
    parser.add_argument("--sample_data", type=_absolute, default=ROOT / ".sample_data")
    parser.add_argument("--baselines", type=_absolute, default=BASELINES)
    parser.add_argument("--reports", type=_absolute, default=REPORTS)
    return parser.parse_args(argv)


def _absolute(path: str) -> Path:
    return Path(path).resolve()


def given_data(pairs: list[str]) -> dict[str, Path]:
    """Folders by project, of --data."""
    found = {}
    for pair in pairs:
        name, equals, folder = pair.partition("=")
        if not equals or not Path(folder).is_dir():
            raise UsageError(f"--data {pair}: give PROJECT=DIR with a folder that exists")
        found[_projects([name])[0]] = Path(folder).resolve()
    return found


def _projects(names: list[str] | None) -> list[str]:
    try:
        return short_names(names)
    except ValueError as error:
        raise UsageError(str(error)) from None


@print_usage_errors
def main(argv: list[str] | None = None) -> int:
    options = read_options(argv)
    projects, data = _projects(options.project), given_data(options.data)
    device = devices.resolve(options.device).type
    if not options.sample_data.is_dir() and any(project not in data for project in projects):
        raise UsageError(f"{options.sample_data}: no sample data; run `make sample_data`, or give --data PROJECT=DIR")
    cards = torch.get_device_module(device).device_count() if device != "cpu" else 1
    precision = options.precision or ("fp32" if device == "cpu" else "bf16")
    kind = "cpu" if device == "cpu" else "accelerator"
    baselines = options.baselines / machine.folder_name(device)
    results = []
    for project in projects:
        for ranks in options.ranks or ([1, 8] if cards >= 8 else [1]):
            output = options.reports / f"{re.sub('_for_PyTorch', '', project)}_{ranks}p"
            given = inputs(project, kind, data.get(project), options.sample_data, options.reports / "inputs")
            result = run_case(project, ranks, device, precision, SETTINGS[kind][project], given, output)
            result.key["data"] = "given" if project in data else "sample"
            judge(result, baselines, options.update)
            print(f"{result.verdict} {project} {ranks}p: {result.reason or f'{result.fps:.2f} samples/s'}", flush=True)
            results.append(result)
    path = write_report(results, device, options.reports)
    print(f"\n{table(results)}\n\nreport: {path}")
    return exit_code(results, device)
