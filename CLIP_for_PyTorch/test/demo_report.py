"""The end of demo.sh: recalls beside guessing and the words of the nearest pictures; arguments: DATA OUTPUT."""

import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path

from ci.yardsticks import report, words
from ci.yardsticks.early import EARLY

PROJECT = Path(__file__).resolve().parents[1]
RECALLS = ("text_to_image_R@1", "text_to_image_R@10", "image_to_text_R@1", "image_to_text_R@10")


@dataclass(frozen=True)
class Split:
    """A table of held-out pairs: `binding` are the recalls that must beat what needs no learning."""

    table: str
    results: str  # folder in the output
    label: str
    prefix: str  # of its metrics
    binding: tuple[str, ...] = ()
    untrained: str = ""  # folder of the control's results in the output


SPLITS = (
    Split(
        "unseen_combination",
        ".",
        "unseen combination",
        "",
        # not the captions' R@10: of a figure's few tones the nearest pictures nearly always name the right one
        ("text_to_image_R@1", "image_to_text_R@1", "image_to_text_R@10"),
        "untrained",
    ),
    Split("unseen_concept", "unseen_concept", "unseen concept", "concept_"),
)


def lines_of(split: Split, data: Path, output: Path) -> list[report.Line]:
    """A line for each of RECALLS, in percent."""
    without = words.retrieval(data / "train.jsonl", data / f"{split.table}.jsonl")
    found, lines = results(output / split.results), []
    for recall in RECALLS:
        beside = {"guessing": without["guessing"][recall], "words of nearest": without["words_of_nearest"][recall]}
        if split.untrained:
            beside["untrained"] = 100 * results(output / split.untrained)[f"eval_{recall}"]
        label = f"{split.label}, {recall.replace('_', ' ')}, %"
        value = 100 * found[f"eval_{recall}"]
        lines.append(report.Line(split.prefix + recall, label, value, beside, recall in split.binding))
    return lines


def results(folder: Path) -> dict[str, float]:
    return json.loads((folder / "eval_results.json").read_text())


def main(data: Path, output: Path) -> int:
    promise = report.promises(PROJECT / "test" / "demo.sh")
    lines, losses = [], {}
    for split in SPLITS:
        found = results(output / split.results)
        lines += lines_of(split, data, output)
        losses[f"{split.prefix}eval_loss"] = found["eval_loss"]
    first = lines[0]
    evaluations = report.read_evaluations(output / "metrics.jsonl")
    thresholds = {"yardstick": first.yardstick, "goal": promise.least[first.metric]}
    seconds = {
        f"{first.metric}_{name}": report.cpu_seconds_to(evaluations, f"eval_{first.metric}", least / 100)
        for name, least in thresholds.items()
    }
    spent = report.cpu_seconds_of(output / "times.txt")
    more = losses | EARLY[PROJECT.name].read(evaluations)
    code = report.conclude(lines, output / "demo.json", promise, spent, cpu_seconds_to=seconds, **more)
    guessing = math.log(found["eval_batch_size"])
    print(
        "eval loss: " + ", ".join(f"{split.label} {losses[f'{split.prefix}eval_loss']:.2f}" for split in SPLITS), end=""
    )
    print(f"; guessing {guessing:.2f}")
    print(f"loss plot: {output}/loss.png; queries and answers: retrieval.png there and in {output}/unseen_concept")
    if losses["eval_loss"] >= guessing:
        print("error: the evaluation loss is not below guessing")
        return 1
    return code


if __name__ == "__main__":
    sys.exit(main(*map(Path, sys.argv[1:3])))
