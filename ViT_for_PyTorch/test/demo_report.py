"""The end of demo.sh: accuracy beside guessing and the nearest training picture; arguments: PICTURES OUTPUT."""

import sys
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(PROJECT.parent))

from ci.yardsticks import pixels, report  # noqa: E402


def main(pictures: Path, output: Path) -> int:
    promise = report.promises(PROJECT / "configs" / "run_vit_demo.yaml")
    evaluations = report.read_evaluations(output / "metrics.jsonl")
    without = pixels.nearest_class(pictures / "train", pictures / "val")
    beside = {"guessing": without["guessing"], "nearest pixels": without["nearest_pixels"]}
    line = report.Line("top1", "top-1, held-out emoji families, %", evaluations[-1]["top1"], beside)
    thresholds = {"top1_yardstick": line.yardstick, "top1_goal": promise.least["top1"]}
    seconds = {name: report.cpu_seconds_to(evaluations, "top1", least) for name, least in thresholds.items()}
    spent = report.cpu_seconds_of(output / "times.txt")
    code = report.conclude([line], output / "demo.json", promise, spent, cpu_seconds_to=seconds)
    print(f"loss plot: {output}/loss.png; predictions as pictures: {output}/predictions.png")
    return code


if __name__ == "__main__":
    sys.exit(main(*map(Path, sys.argv[1:3])))
