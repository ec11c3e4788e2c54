"""Does each project still learn? Its demo from three seeds on the sample data, against the quality it had before.

    python -m ci.gates.outcomes                       # all four: under an hour on two cores; exit 1 on a regression
    python -m ci.gates.outcomes --only ViT_for_PyTorch --seeds 0
    python -m ci.gates.outcomes --results DIR         # judge an earlier run again
    python -m ci.gates.outcomes --update              # store what was measured (say why in the commit)
    python -m ci.gates.outcomes --planted             # faults of learning that must fail (planted.py): 20 CPU minutes

A run is the project's own `test/demo.sh SAMPLE_DATA OUTPUT SEED`; its numbers are those it writes to OUTPUT/demo.json.
The verdict is one-sided, on the mean over seeds: it fails below `limit` = mean - 3 x spread, where the mean and the
sample standard deviation are those of the three stored seeds and the spread is at least FLOOR of the mean (three values
can lie close by luck). Between two means of three that is 3.7 standard errors: by Student's t with two degrees of
freedom an unchanged program fails about once in 30 releases. However noisy a metric is, its limit is at least KEPT of
the way from its yardstick, the best that needs no learning on the same split, to the stored mean: losing a quarter of
what was learned fails. A demo that ends without its numbers fails; one whose own check, made for its one seed, is not
content has written them, and the band decides. Time to quality is shown beside what it was, without a verdict: CPU
seconds are those of one machine.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from ci.gates.outcomes import planted
from common.device import available_cores
from common.errors import UsageError, print_usage_errors

ROOT = Path(__file__).resolve().parents[3]
STORED = ROOT / "ci" / "baselines" / "outcomes"
DEFAULT_OUTPUT = ROOT / "ci" / "reports" / "outcomes"
SEEDS = (0, 10, 20)  # BEiT v2's demo fine-tunes from seed, seed + 1 and seed + 2
SPREADS, FLOOR, KEPT = 3.0, 0.02, 0.75
# the keys of demo.json that must not fall, and their yardsticks: the best without learning (ci/yardsticks)
METRICS = {
    "ViT_for_PyTorch": {"top1": 60.2, "top1_other_artist": 22.6, "top1_early": 18.0},  # nearest pixels; guessing
    # guessing: nearest pixels (45.6) are not passed by three seeds; the commonest token
    "Beit2_for_PyTorch": {"pretrained": 18.0, "masked_tokens": 18.1},
    "CLIP_for_PyTorch": {  # words of the nearest pictures, which have 99 from text to image at 10: there it is guessing
        "text_to_image_R@1": 57.1,
        "text_to_image_R@10": 3.4,
        "image_to_text_R@1": 60.4,
        "image_to_text_R@10": 86.2,
        "text_to_image_R@1_early": 0.3,
    },
    "Data2vec_for_PyTorch": {"probe": 39.0, "teacher_probe": 38.3, "pictures_cloze": 0.1},  # counting; untrained
}


@dataclass(frozen=True)
class Verdict:
    """One metric of one project; `measured` has a value a seed, and is empty where no run ended well."""

    project: str
    metric: str
    measured: tuple[float, ...]
    reference: float
    limit: float
    failure: str = ""

    @property
    def passed(self) -> bool:
        return not self.failure and bool(self.measured) and statistics.mean(self.measured) >= self.limit


def run_demo(project: str, seed: int, data: Path, folder: Path) -> None:
    """Runs a demo at one thread, its output in folder/demo.txt, and notes its exit code in folder/run.json."""
    folder.mkdir(parents=True, exist_ok=True)
    script = ROOT / project / "test" / "demo.sh"
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    for other in ("CAPTIONS", "RANDOM_TOKENIZER"):  # of the demos: their numbers have other limits
        environment.pop(other, None)
    began = time.perf_counter()
    with open(folder / "demo.txt", "w") as log:
        command = ["bash", str(script), str(data), str(folder), str(seed)]
        status = subprocess.run(command, env=environment, stdout=log, stderr=subprocess.STDOUT).returncode
    seconds = round(time.perf_counter() - began)
    (folder / "run.json").write_text(json.dumps({"exit": status, "seconds": seconds}))
    print(f"{project} seed {seed}: exit {status} after {seconds} s, see {folder / 'demo.txt'}", flush=True)


def _read_json(path: Path) -> dict:
    """UsageError for a file that was cut short, as a run that was killed leaves it."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UsageError(f"{path}: cannot be read ({error}); remove its folder and run that seed again") from None
    if not isinstance(found, dict):
        raise UsageError(f"{path}: is no record of a run; remove its folder and run that seed again")
    return found


def read_results(project: str, seeds: list[int], output: Path) -> tuple[dict[str, tuple[float, ...]], str]:
    """({metric: a value a seed that has one}, which runs did not end well or "")."""
    numbers, failures = [], []
    for seed in seeds:
        folder = output / project / f"seed-{seed}"
        if not (folder / "run.json").exists():
            failures.append(f"seed {seed} did not run")
            continue
        status = _read_json(folder / "run.json").get("exit", "unknown")
        if (folder / "demo.json").exists():
            numbers.append(_read_json(folder / "demo.json"))
        else:
            failures.append(f"seed {seed} ended with exit code {status}")
    for metric in METRICS[project]:
        if any(metric not in found for found in numbers):
            raise UsageError(f"{output / project}: demo.json has no {metric!r}; METRICS in ci/gates/outcomes names it")
    values = {metric: tuple(float(found[metric]) for found in numbers) for metric in METRICS[project]}
    return values, "; ".join(failures)


def limit_of(values: list[float], yardstick: float) -> float:
    """The lowest acceptable mean, from the stored seeds' values."""
    mean = statistics.mean(values)
    band = mean - SPREADS * max(statistics.stdev(values), FLOOR * abs(mean))
    return max(band, yardstick + KEPT * (mean - yardstick))


def judge(project: str, measured: dict[str, tuple[float, ...]], failure: str, stored: dict) -> list[Verdict]:
    """A verdict a metric."""
    verdicts = []
    for metric, yardstick in METRICS[project].items():
        if metric not in stored["metrics"]:
            raise UsageError(
                f"{project}: no reference for {metric!r}; run python -m ci.gates.outcomes --only {project} --update"
            )
        values = stored["metrics"][metric]["values"]
        mean = statistics.mean(values)
        verdicts.append(Verdict(project, metric, measured[metric], mean, limit_of(values, yardstick), failure))
    return verdicts


def table(verdicts: list[Verdict]) -> str:
    """Markdown: a row a metric."""
    text = "| project | metric | measured: mean (seeds) | stored mean | limit | verdict |\n|---|---|---|---|---|---|\n"
    for v in verdicts:
        values = ", ".join(f"{value:.2f}" for value in v.measured)
        measured = f"{statistics.mean(v.measured):.2f} ({values})" if v.measured else "nothing"
        verdict = "pass" if v.passed else f"FAIL {v.failure}".strip()
        text += f"| {v.project} | {v.metric} | {measured} | {v.reference:.2f} | {v.limit:.2f} | {verdict} |\n"
    return text


def read_seconds(project: str, seeds: list[int], output: Path) -> dict[str, list[float]]:
    """{threshold: CPU seconds of training until it was passed, of the seeds that passed it}."""
    seconds: dict[str, list[float]] = {}
    for seed in seeds:
        path = output / project / f"seed-{seed}" / "demo.json"
        if path.exists():
            for threshold, spent in json.loads(path.read_text(encoding="utf-8")).get("cpu_seconds_to", {}).items():
                seconds.setdefault(threshold, []).extend([] if spent is None else [spent])
    return seconds


def time_table(project: str, seconds: dict[str, list[float]], seeds: int, stored: dict) -> str:
    """Markdown rows: CPU seconds to each threshold, and what they were."""
    text = ""
    for threshold, values in seconds.items():
        earlier = stored.get("cpu_seconds_to", {}).get(threshold, [])
        now, before = (f"{statistics.mean(v):.0f} s" if v else "" for v in (values, earlier))
        text += f"| {project} | {threshold} | {now} ({len(values)} of {seeds} seeds) | {before} |\n"
    return text


def load_stored(project: str, folder: Path) -> dict:
    path = folder / f"{project}.json"
    if not path.exists():
        raise UsageError(f"{path} does not exist: run python -m ci.gates.outcomes --only {project} --update")
    return json.loads(path.read_text(encoding="utf-8"))


def store(
    project: str,
    seeds: list[int],
    measured: dict[str, tuple[float, ...]],
    seconds: dict[str, list[float]],
    folder: Path,
) -> Path:
    """Writes the reference of a project with where its numbers come from."""
    if len(seeds) < 3:
        raise UsageError(f"--update with {len(seeds)} seeds: a spread needs at least 3")
    metrics = {
        metric: {
            "values": list(values),
            "mean": round(statistics.mean(values), 4),
            "spread": round(statistics.stdev(values), 4),
            "limit": round(limit_of(list(values), METRICS[project][metric]), 4),
        }
        for metric, values in measured.items()
    }
    cpu = torch.cpu.get_capabilities().get("cpu_name", platform.processor())
    record = {
        "command": f"bash {project}/test/demo.sh SAMPLE_DATA OUTPUT SEED",
        "seeds": seeds,
        "cpu": cpu,
        "torch": torch.__version__,
        "band": f"one-sided: mean of the seeds - {SPREADS:g} x max(their sample deviation, {FLOOR:g} x mean), "
        f"and {KEPT:g} of the way from the yardstick at least",
        "metrics": metrics,
        "cpu_seconds_to": seconds,
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{project}.json"
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return path


def try_planted(names: list[str], seed: int, output: Path, folder: Path) -> int:
    """Runs the demos with these faults, one after the other; 0 where every one is caught. `folder` has the limits."""
    limits = {}  # known before the first run, not after
    for name in names:
        project = planted.FAULTS[name].project
        for metric, found in load_stored(project, folder)["metrics"].items():
            limits[name, metric] = limit_of(found["values"], METRICS[project][metric])
    data, rows = sample_data(), []
    for name in names:
        numbers = planted.run(name, seed, data, output / name.replace(" / ", "_over_").replace(" ", "_"))
        print(f"{name}: {numbers or 'ended without a number'}", flush=True)
        rows += [(name, metric, value, limits[name, metric]) for metric, value in numbers.items()]
    print(planted.table(rows))
    missed = [name for name in names if name not in planted.caught(rows)]
    if missed:
        print(f"not caught: {', '.join(missed)}")
    return 1 if missed else 0


def sample_data() -> Path:
    from ci.sample_data.build import DEFAULT_OUTPUT as SAMPLE_DATA
    from ci.sample_data.build import build

    return build(SAMPLE_DATA)


def read_options(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m ci.gates.outcomes", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=list(METRICS), metavar="PROJECT", help="default: all")
    parser.add_argument("--seeds", nargs="+", type=int, help=f"default: {SEEDS}; of --planted: {SEEDS[0]}")
    parser.add_argument("--jobs", type=int, help="demos at a time, each at one thread; default: the cores")
    parser.add_argument("--output_dir", type=Path, help="default: a new folder in ci/reports/outcomes")
    parser.add_argument("--results", type=Path, help="judge the runs of this folder; start none")
    parser.add_argument("--stored", type=Path, default=STORED, help="folder of the references")
    parser.add_argument("--update", action="store_true", help="store the measured values as the reference")
    parser.add_argument(
        "--planted", nargs="*", choices=list(planted.FAULTS), metavar="FAULT", help="faults of learning; alone: all"
    )
    options = parser.parse_args(argv)
    if options.jobs is not None and options.jobs < 1:
        parser.error(f"--jobs {options.jobs}: must be 1 or more")
    seeds = options.seeds or []
    if len(set(seeds)) < len(seeds):
        parser.error(f"--seeds {' '.join(map(str, seeds))}: one of them stands there twice")
    if options.planted is not None:
        for name in ("only", "jobs", "results", "update"):
            if getattr(options, name):
                parser.error(f"--{name}: has no meaning with --planted, which runs its own demos one by one")
        if len(seeds) > 1:
            parser.error(f"--seeds {' '.join(map(str, seeds))}: --planted runs from one seed")
    for name in ("jobs", "output_dir"):
        if options.results and getattr(options, name):
            parser.error(f"--{name}: has no meaning with --results, which starts no run")
    options.only = options.only or list(METRICS)
    options.seeds = seeds or list(SEEDS)
    options.jobs = options.jobs or available_cores()
    return options


@print_usage_errors
def main(argv: list[str] | None = None) -> int:
    options = read_options(argv)
    output = options.results or options.output_dir or DEFAULT_OUTPUT / time.strftime("%Y%m%d-%H%M%S")
    output = output.resolve()
    if options.results is None and output.is_dir() and any(output.iterdir()):
        raise UsageError(f"--output_dir {output} is not empty; --results {output} judges what is in it")
    if options.planted is not None:
        return try_planted(options.planted or list(planted.FAULTS), options.seeds[0], output, options.stored)
    if not options.update:  # known before hours of training, not after
        for project in options.only:
            load_stored(project, options.stored)
    if options.results is None:
        data = sample_data()
        jobs = [(p, seed, data, output / p / f"seed-{seed}") for p in options.only for seed in options.seeds]
        with ThreadPoolExecutor(options.jobs) as pool:
            list(pool.map(lambda job: run_demo(*job), jobs))
    verdicts, times = [], ""
    for project in options.only:
        measured, failure = read_results(project, options.seeds, output)
        if options.update:
            if failure:
                raise UsageError(f"{project}: {failure}: its reference stays as it is")
            seconds = read_seconds(project, options.seeds, output)
            print(f"stored {store(project, options.seeds, measured, seconds, options.stored)}")
        stored = load_stored(project, options.stored)
        verdicts += judge(project, measured, failure, stored)
        times += time_table(project, read_seconds(project, options.seeds, output), len(options.seeds), stored)
    print(table(verdicts))
    if times:
        print(f"| project | CPU seconds of training until | measured | stored |\n|---|---|---|---|\n{times}")
    return 0 if all(verdict.passed for verdict in verdicts) else 1
