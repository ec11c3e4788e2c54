"""The end of demo.sh: accuracy beside guessing and the nearest training picture; arguments: PICTURES OTHER_ARTIST
OUTPUT."""

import sys
from pathlib import Path

from ci.yardsticks import pixels, report
from ci.yardsticks.early import EARLY
from common.run import result_file

PROJECT = Path(__file__).resolve().parents[1]


def line(metric: str, label: str, value: float, train: Path, val: Path, **more: float) -> report.Line:
    """A top-1 on the image folder `val`, beside what needs no learning."""
    without = pixels.nearest_class(train, val)
    beside = {"guessing": without["guessing"], "nearest pixels": without["nearest_pixels"], **more}
    return report.Line(metric, label, value, beside)


def accuracy(folder: Path, kind: str) -> float:
    """Of the evaluation in a folder, in percent."""
    (result,) = folder.glob(f"*_{kind}_*_acc.log")
    return float(result_file.read(result)["TrainAccuracy"])


def main(pictures: Path, other_artist: Path, output: Path) -> int:
    promise = report.promises(PROJECT / "configs" / "run_vit_demo.yaml")
    evaluations = report.read_evaluations(output / "metrics.jsonl")
    of_other = accuracy(output / "other_artist", "eval")
    untrained = accuracy(output / "untrained", "knn")
    train, val, learned = pictures / "train", pictures / "val", evaluations[-1]["top1"]
    same = line("top1", "top-1, held-out emoji families, %", learned, train, val, untrained=untrained)
    other = line("top1_other_artist", "the same by another artist, %", of_other, train, other_artist / "val")
    thresholds = {"top1_yardstick": same.yardstick, "top1_goal": promise.least["top1"]}
    seconds = {name: report.cpu_seconds_to(evaluations, "top1", least) for name, least in thresholds.items()}
    spent = report.cpu_seconds_of(output / "times.txt")
    early = EARLY[PROJECT.name].read(evaluations)
    code = report.conclude([same, other], output / "demo.json", promise, spent, cpu_seconds_to=seconds, **early)
    print(f"loss plot: {output}/loss.png; predictions as pictures: {output}/predictions.png")
    return code


if __name__ == "__main__":
    sys.exit(main(*map(Path, sys.argv[1:4])))
