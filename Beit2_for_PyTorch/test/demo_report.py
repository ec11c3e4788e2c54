"""The end of demo.sh: accuracy from a tenth of the labels, beside what trains nothing; arguments: PICTURES OUTPUT."""

import re
import statistics
import sys
from pathlib import Path

from ci.yardsticks import pixels
from ci.yardsticks.report import Line, conclude, cpu_seconds_of, promises

PROJECT = Path(__file__).resolve().parents[1]
TENTHS = range(3)


def accuracies(output: Path, start: str) -> list[float]:
    """Percent of the held-out pictures, a value a tenth of the labels."""
    files = [output / f"{start}-{number}" / "Beit2_for_PyTorch_bs25_1p_acc.log" for number in TENTHS]
    return [float(re.search(r"^TrainAccuracy = (.*)$", file.read_text(), re.M)[1]) for file in files]


def masked_tokens(output: Path) -> Line:
    """How many masked patches' tokens the pretrained model names right, on held-out pictures."""
    said = (output / "predictions.txt").read_text(encoding="utf-8")
    right, commonest = map(float, re.search(r"right: ([\d.]+) %; their commonest token: ([\d.]+) %", said).groups())
    return Line("masked_tokens", "masked tokens of held-out pictures, %", right, {"commonest token": commonest})


def main(pictures: Path, output: Path) -> int:
    values = {start: accuracies(output, start) for start in ("pretrained", "scratch")}
    for start, measured in values.items():
        print(f"{start}: {', '.join(f'{value:.1f}' for value in measured)} % of held-out pictures right, a tenth each")
    means = {start: statistics.mean(measured) for start, measured in values.items()}
    without = [pixels.nearest_class(output / f"labels-{number}", pictures / "val") for number in TENTHS]
    nearest = statistics.mean(row["nearest_pixels"] for row in without)
    gain, over_pixels = means["pretrained"] - means["scratch"], means["pretrained"] - nearest
    beside = {"guessing": without[0]["guessing"]}
    lines = [
        masked_tokens(output),
        Line("pretrained", "top-1, a tenth of the labels, %", means["pretrained"], beside),
        # shown, not bound: so few steps of pretraining beat neither of the two (README)
        Line("finetune_gain", "points above from scratch", gain, {"from scratch": 0.0}, binding=False),
        Line("pixels_gain", "points above nearest pixels", over_pixels, {"nearest pixels": 0.0}, binding=False),
    ]
    spent = cpu_seconds_of(output / "times.txt")
    code = conclude(
        lines,
        output / "demo.json",
        promises(PROJECT / "test" / "demo.sh"),
        spent,
        scratch=means["scratch"],
        nearest_pixels=nearest,
    )
    print(f"loss plot: {output}/pretraining/loss.png; masked, predicted and true tokens: {output}/predictions.png")
    return code


if __name__ == "__main__":
    sys.exit(main(*map(Path, sys.argv[1:3])))
