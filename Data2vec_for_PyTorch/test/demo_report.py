"""The end of demo.sh: what the representations know, beside what needs no learning; argument: OUTPUT."""

import sys
from pathlib import Path

from ci.yardsticks.report import Line, conclude, cpu_seconds_of, promises

PROJECT = Path(__file__).resolve().parents[1]
LEAST_GAIN = 5.0  # points above the untrained model


def read_table(path: Path) -> dict[str, tuple[float, float]]:
    """{row: (untrained, trained)} of what probe.py printed."""
    lines = path.read_text(encoding="utf-8").splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("on held-out"))
    return {line[:22].strip(): tuple(map(float, line[22:].split())) for line in lines[first + 1 :]}


def text_lines(table: dict[str, tuple[float, float]]) -> list[Line]:
    """The probe of hidden letters; of four neighbours' counts is shown beside it, not beaten."""
    untrained, trained = table["linear probe"]
    beside = {"guessing": table["commonest token"][1], "untrained": untrained, "counting two": table["count table"][1]}
    return [
        Line("probe", "text: hidden letter, linear probe, %", trained, beside),
        Line(
            "probe_of_four",
            "text: the same, beside counts of four neighbours",
            trained,
            {"counting four": table["count table of four"][1]},
            binding=False,
        ),
        Line("probe_gain", "text: probe, points above untrained", trained - untrained, {"untrained": LEAST_GAIN}),
        Line(
            "teacher_probe",
            "text: the same of the teacher, %",
            table["teacher's probe"][1],
            {"untrained": table["teacher's probe"][0] + LEAST_GAIN, "guessing": table["commonest token"][1]},
        ),
    ]


def picture_lines(table: dict[str, tuple[float, float]]) -> list[Line]:
    """Classes of held-out emoji from the representation; raw pixels are shown and not bound to be beaten."""
    lines = []
    for metric, row in (("pictures_nearest", "nearest neighbour"), ("pictures_linear", "linear probe")):
        raw = table["nearest, pixels" if row.startswith("nearest") else "linear probe, pixels"][1]
        beside = {"guessing": table["largest class"][1], "untrained": table[row][0], "raw pixels": raw}
        lines.append(Line(metric, f"pictures: {row}, %", table[row][1], beside, binding=False))
    gain = sum(table[row][1] - table[row][0] for row in ("nearest neighbour", "linear probe")) / 2
    lines.append(Line("pictures_gain", "pictures: mean of both, points above untrained", gain, {"untrained": 0.0}))
    trained, chance = table["cloze retrieval"][1], table["chance"][1]
    lines.append(Line("pictures_cloze", "pictures: 1 hidden patch of 1,000 found, %", trained, {"guessing": chance}))
    return lines


def main(output: Path) -> int:
    lines = text_lines(read_table(output / "text" / "probe.txt"))
    lines += picture_lines(read_table(output / "pictures" / "probe.txt"))
    spent = cpu_seconds_of(output / "times.txt")
    promise = promises(PROJECT / "configs" / "text" / "pretraining" / "demo.yaml")
    code = conclude(lines, output / "demo.json", promise, spent)
    print(f"loss plots: {output}/text/loss.png, {output}/pictures/loss.png; what is expected at masked places:")
    print(f"{output}/text/cloze.png, {output}/pictures/cloze.png")
    return code


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
