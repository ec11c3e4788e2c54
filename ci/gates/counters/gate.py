"""What one training step of each project does, as exact counts, against what was accepted: `make counters`.

    python -m ci.gates.counters                    # all projects against ci/baselines/counters/; exit 1 on a difference
    python -m ci.gates.counters --project ViT      # one of them
    python -m ci.gates.counters --accept           # write what is counted now, for the commit that means to change it

Each project trains three steps through its entry script on made-up data: two to warm up, one counted. Operations by
dtype, host reads, dynamic shapes, bytes, optimizer tensors and learning rates are counted in fp32 and in bf16, with a
weight average and in an fp16 step that overflows, and the collectives on rank 0 of two, with gradient accumulation and
sharded, too. There is no noise and no tolerance. The counts do not
depend on the host: kernels that are chosen by the CPU's instructions are switched to what an accelerator would run.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

from ci.gates import forked_ranks, training_steps
from ci.training_cases import CASES, COUNTED, short_names

ROOT = Path(__file__).resolve().parents[3]
BASELINES = ROOT / "ci" / "baselines" / "counters"
WARM_STEPS = 2  # the first makes the optimizer's state; in the second, DDP settles its buckets
# name of a run: precision, ranks, variant of the case (training_cases.py) where the project has it. Those that fork
# come first, before autograd has threads.
RUNS = {
    "fp32, 2 ranks": ("fp32", 2, ""),
    "fp32, 2 ranks, accumulation": ("fp32", 2, "accumulation"),
    "fp32, 2 ranks, fsdp": ("fp32", 2, "fsdp"),
    "fp32": ("fp32", 1, ""),
    "bf16": ("bf16", 1, ""),
    "fp32, ema": ("fp32", 1, "ema"),
    "fp16, overflow": ("fp16", 1, "overflow"),
    "fp32, compiled": ("fp32", 1, "compiled"),
}
COMPILED_STEPS = 12  # of batches of several lengths
ACCEPT = "python -m ci.gates.counters --accept --project"

Counts = dict[str, Any]  # of one run
Report = dict[str, Counts]  # of one project, by the name of the run


class _OneStep(training_steps.Observer):
    """Counts what happens from the end of the last warm-up step to the end of the next, without fetching batches."""

    def __init__(self) -> None:
        from ci.gates.counters.operation_counter import OperationCounter

        self.counter = OperationCounter()
        self.is_counting = False

    def step_ended(self, step: int, samples: int) -> None:
        if step == WARM_STEPS:
            gc.collect()
            gc.disable()  # memory is then freed at the same place in every run
            self.is_counting = True
            self.counter.__enter__()
        elif step > WARM_STEPS:
            self.counter.__exit__(None, None, None)
            self.is_counting = False
            gc.enable()
            raise training_steps.TrainingStopped

    def data_begins(self) -> None:
        if self.is_counting:
            self.counter.__exit__(None, None, None)

    def data_ends(self) -> None:
        if self.is_counting:
            self.counter.__enter__()


class _Along(training_steps.Observer):
    """Counts nothing and ends a run: the ranks that are not counted after as many steps as the one that is."""

    def __init__(self, steps: int = WARM_STEPS + 1) -> None:
        self.steps = steps

    def step_ended(self, step: int, samples: int) -> None:
        if step >= self.steps:
            raise training_steps.TrainingStopped


# -- one project, in a process of its own ------------------------------------------------------------------------------


def measure(tree: Path, project: str, runs: list[str]) -> Report:
    """The counts of a project in a checkout. Changes this process's modules: call it once in a process."""
    import torch

    torch.set_num_threads(1)
    training_steps.use_tree(tree, project)
    import common.cpu

    common.cpu.has_bf16_instructions = lambda: True  # the host's own answers would decide what is counted
    common.cpu.fused_attention_is_slow = lambda: False
    case = CASES[project]
    with tempfile.TemporaryDirectory() as folder:
        case.prepare(Path(folder), COUNTED)
        importlib.import_module(case.entry)  # once, for all ranks
        report = {}
        for name in runs:
            precision, ranks, variant = RUNS[name]
            if variant and variant not in case.variants:
                continue
            output = Path(folder) / name.replace(", ", "-")
            more = case.variants.get(variant, [])
            command = case.command(Path(folder), COUNTED, output, "cpu", precision, "--seed", "1", *more)
            if variant == "compiled":
                report[name] = count_graphs(case.entry, command)
            elif ranks > 1:
                report[name] = count_ranks(case.entry, command, ranks, Path(folder) / "counts.json")
            else:
                report[name] = count_step(case.entry, command, ranks)
    return report


def count_ranks(entry: str, arguments: list[str], ranks: int, path: Path) -> Counts:
    """What `count_step` counts on rank 0 of several, which are forks of this process."""

    def train(words: list[str]) -> None:
        if os.environ["RANK"] == "0":
            path.write_text(json.dumps(count_step(entry, words, ranks)))
        elif not training_steps.train(entry, words, _Along()):
            raise RuntimeError(f"{entry} ended before the step to be counted")

    if forked_ranks.run_ranks(ranks, train, arguments):
        raise RuntimeError("the counting of several ranks failed")
    return json.loads(path.read_text())


def count_step(entry: str, arguments: list[str], ranks: int) -> Counts:
    """Trains a few steps and counts the last one."""
    import torch
    from torch.optim.optimizer import register_optimizer_step_post_hook

    observer, optimizers, steps = _OneStep(), [], []

    def optimizer_stepped(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        optimizers.append(optimizer)
        steps.append(observer.is_counting)

    hook = register_optimizer_step_post_hook(optimizer_stepped)
    try:
        if not training_steps.train(entry, arguments, observer):
            raise RuntimeError(f"{entry} ended before the step to be counted")
    finally:
        hook.remove()
    counter = observer.counter
    counts: Counts = {
        "totals": {
            "operations": counter.operations.total(),
            "host reads": counter.host_reads.total(),
            "dynamic shapes": counter.dynamic_shapes.total(),
            "allocated bytes": counter.allocated_bytes,
            "peak live bytes": counter.peak_bytes,
            "optimizer steps": sum(steps),
        },
        "operations": dict(sorted(counter.operations.items())),
        "host reads": dict(sorted(counter.host_reads.items())),
        "dynamic shapes": dict(sorted(counter.dynamic_shapes.items())),
    }
    if optimizers:  # none where every step overflowed
        counts["totals"] |= sizes_of(optimizers[-1])
        counts["optimizer"] = {describe_optimizer(optimizers[-1]): len(optimizers[-1].param_groups)}
        rates = Counter(f"lr {group['lr']:.8g}" for group in optimizers[-1].param_groups)
        counts["rates of the last step"] = dict(sorted(rates.items()))  # and how many parameter groups have it
    if ranks > 1:
        counts = {
            "totals": {"collectives": counter.collectives.total(), "collective bytes": counter.collective_bytes},
            "collectives": dict(sorted(counter.collectives.items())),
        }
    return counts


def count_graphs(entry: str, arguments: list[str]) -> Counts:
    """Graphs and breaks of a run's first steps under torch.compile, as dynamo makes them: no code is generated."""
    from torch._dynamo.utils import counters

    compilation = importlib.import_module("common.model.compilation")
    compilation.BACKEND = "eager"
    counters.clear()
    training_steps.train(entry, arguments, _Along(COMPILED_STEPS))
    breaks = sum(counters["graph_break"].values())
    return {"totals": {"graphs": counters["stats"]["unique_graphs"], "graph breaks": breaks}}


def sizes_of(optimizer: Any) -> dict[str, int]:
    import torch

    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    state = [v for values in optimizer.state.values() for v in values.values() if isinstance(v, torch.Tensor)]
    return {
        "parameters": sum(p.numel() for p in parameters),
        "parameter tensors": len(parameters),
        "optimizer tensors": len(state),
        "optimizer bytes": sum(tensor.nbytes for tensor in state),
    }


def describe_optimizer(optimizer: Any) -> str:
    """Its class, and how it is computed: fused, foreach or one parameter at a time."""
    ways = [way for way in ("fused", "foreach") if optimizer.defaults.get(way)]
    return " ".join([type(optimizer).__name__, *ways])


# -- comparison --------------------------------------------------------------------------------------------------------


def torch_version() -> str:
    import torch

    return f"torch {torch.__version__.partition('+')[0]}"


def count_project(project: str, tree: Path = ROOT, runs: list[str] | None = None) -> Report:
    """The counts of a project, from a fresh process.

    Raises:
        RuntimeError: its training failed; the message has its last lines.
    """
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "RANK_ID")}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "counts.json"
        command = [sys.executable, "-m", "ci.gates.counters", "--measure", str(path), "--tree", str(tree)]
        command += ["--project", project, "--runs", *(runs or RUNS)]
        environment |= {"OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0"}
        result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)
        if result.returncode:
            raise RuntimeError(f"{project}: counting failed:\n{result.stdout[-1000:]}{result.stderr[-3000:]}")
        return json.loads(path.read_text())


def differences(accepted: Report, counted: Report) -> list[tuple[str, str, Any, Any]]:
    """(run, what, accepted, counted) of everything that differs; a thing on one side only has None on the other."""
    rows = []
    for run in dict.fromkeys([*accepted, *counted]):
        old, new = accepted.get(run, {}), counted.get(run, {})
        for section in dict.fromkeys([*old, *new]):
            before, after = old.get(section, {}), new.get(section, {})
            for name in dict.fromkeys([*before, *after]):
                if before.get(name) != after.get(name):
                    what = name if section == "totals" else f"{section}: {name}"
                    rows.append((run, what, before.get(name), after.get(name)))
    return rows


def table(rows: list[tuple[str, str, Any, Any]]) -> str:
    """The differences as aligned text: totals first, each with its change."""

    def number(value: Any) -> str:
        return "-" if value is None else f"{value:,}"

    rows = sorted(rows, key=lambda row: (list(RUNS).index(row[0]) if row[0] in RUNS else 99, ":" in row[1]))
    cells = [("run", "what", "accepted", "counted", "change")]
    for run, what, old, new in rows:
        change = (new or 0) - (old or 0)
        relative = f" ({change / old:+.1%})" if old else ""
        cells.append((run, what, number(old), number(new), f"{change:+,}{relative}"))
    widths = [max(len(row[column]) for row in cells) for column in range(5)]
    lines = []
    for run, what, *numbers in cells:
        right = "  ".join(text.rjust(width) for text, width in zip(numbers, widths[2:], strict=True))
        lines.append(f"  {run.ljust(widths[0])}  {what.ljust(widths[1])}  {right}")
    return "\n".join(lines)


def check(project: str, counted: Report, folder: Path = BASELINES) -> str | None:
    """What is wrong with the counts of a project, as text for people; None when they are the accepted ones."""
    path, version = folder / f"{project}.json", torch_version()
    stored = json.loads(path.read_text()) if path.exists() else {}
    if version not in stored:
        known = f"it has {', '.join(stored)}" if stored else "there is no such file"
        return f"{project}: no accepted counts for {version} in {path} ({known}); accept them: {ACCEPT} {project}"
    rows = differences(stored[version], counted)
    if not rows:
        return None
    return (
        f"{project}: a training step does something else than was accepted ({version})\n{table(rows)}\n"
        f"If that is meant: {ACCEPT} {project}, commit the file and say why in the commit."
    )


def accept(project: str, counted: Report, folder: Path = BASELINES) -> Path:
    """Writes the counts under this torch's version; those of other versions stay."""
    path = folder / f"{project}.json"
    stored = json.loads(path.read_text()) if path.exists() else {}
    stored[torch_version()] = counted
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(dict(sorted(stored.items())), indent=1) + "\n")
    return path


def summary(project: str, counted: Report) -> str:
    totals = counted["bf16"]["totals"]
    ranks = counted["fp32, 2 ranks"]["totals"]
    return (
        f"{project}: {totals['operations']} operations, {totals['host reads']} host reads, "
        f"{totals['dynamic shapes']} dynamic shapes, {totals['peak live bytes'] / 2**20:.2f} MiB peak in bf16, "
        f"{ranks['collectives']} collectives"
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--project", nargs="+", help="ViT, Beit2, CLIP, Data2vec; default: all")
    parser.add_argument("--accept", action="store_true", help="write the counts instead of comparing them")
    parser.add_argument("--tree", type=Path, default=ROOT, help="count another checkout")
    parser.add_argument("--runs", nargs="+", choices=list(RUNS), default=list(RUNS), help=argparse.SUPPRESS)
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)  # the process that counts: writes JSON there
    options = parser.parse_args(argv)
    try:
        projects = short_names(options.project)
    except ValueError as error:
        parser.error(str(error))
    if options.measure:
        options.measure.write_text(json.dumps(measure(options.tree.resolve(), projects[0], options.runs)))
        return 0

    problems = []
    for project in projects:
        counted = count_project(project, options.tree)
        print(summary(project, counted), flush=True)
        if options.accept:
            print(f"accepted: {accept(project, counted).relative_to(ROOT)}")
            continue
        problem = check(project, counted)
        problems += [problem] if problem else []
    for problem in problems:
        print(f"\n{problem}", file=sys.stderr)
    return 1 if problems else 0
