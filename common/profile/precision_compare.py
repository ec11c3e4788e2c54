"""Names the first module where two runs part, from what `--dump_precision` wrote of each.

    python -m common.profile.precision_compare RUN_A RUN_B                  # folders of runs, or dump.json of each
    python -m common.profile.precision_compare RUN_A RUN_B --limit 1e-2     # in half precision

Runs of the same weights and batches: same seed, without dropout where the devices differ (their random streams do). The
page is Markdown, on stdout and with --output in a file. Exit code: 0 they agree, 1 they part, 2 nothing to compare.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from dataclasses import dataclass
from pathlib import Path

from common.errors import UsageError, print_usage_errors
from common.profile.precision_dump import FOLDER, STATISTICS

# Relative difference that rounding explains, by type: sums in another order, through a whole model.
LIMITS = {"torch.float32": 2e-5, "torch.bfloat16": 2e-2, "torch.float16": 5e-3}
ROWS = 30
_ENTRY = re.compile(
    r"Module\.(?P<place>.+?)(?:\.(?P<kind>[^.]+))\.(?P<way>forward|backward|parameters_grad)\.(?P<n>\d+)"
)
_WORDS = {"forward": "the result", "backward": "the gradient of the result", "parameters_grad": "the gradient of"}


@dataclass(frozen=True)
class Row:
    """What differs in one entry: relative differences of what goes in and of what comes out."""

    place: str
    kinds: tuple[str, str]  # class in A, in B
    way: str
    number: int
    dtype: str
    shape: str
    given: float
    made: float
    limit: float

    @property
    def parts(self) -> bool:
        return not self.made <= self.limit  # nan, too


def read(path: str | Path, rank: int = 0) -> dict[tuple[str, str, int], tuple[str, dict]]:
    """(place of the module, way, call) -> (class, entry) of a dump.json or of a run's folder.

    Raises:
        UsageError: no dump there, or a file that is none.
    """
    path = Path(path)
    if not path.exists():
        raise UsageError(f"{path}: no such file or folder")
    if path.is_dir():
        found = sorted(path.glob(f"{FOLDER}/step*/rank{rank}/dump.json"), key=lambda file: file.stat().st_mtime)
        if not found:
            raise UsageError(f"{path}: no {FOLDER}/ of rank {rank}: run with --dump_precision (or DUMP_PRECISION=1)")
        path = found[-1]
    try:
        data = json.loads(path.read_text(encoding="utf-8"))["data"]
        for entry in data.values():
            for tensors in entry.values():
                _check(tensors)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UsageError(f"{path}: not a dump.json of --dump_precision ({error}); give a run's output folder") from None
    entries = {}
    for name, entry in data.items():
        if parts := _ENTRY.fullmatch(name):
            entries[parts["place"], parts["way"], int(parts["n"])] = (parts["kind"], entry)
    return entries


def _check(tensors: list[dict]) -> None:
    """ValueError, KeyError or TypeError where it is not what precision_dump.py writes of some tensors."""
    for tensor in tensors:
        if type(tensor["dtype"]) is not str or not all(type(n) is int and n >= 0 for n in tensor["shape"]):
            raise ValueError("a tensor without a type and a shape")
        wanted = STATISTICS if math.prod(tensor["shape"]) else ()
        if not all(type(tensor[name]) in (int, float) for name in wanted) or (not wanted and "Norm" in tensor):
            raise ValueError("a tensor without its four numbers")


def difference(a: list[dict], b: list[dict]) -> float:
    """Largest relative difference of the numbers of two lists of tensors of the same shapes.

    A value is measured by the tensor's largest magnitude, the mean by its root mean square, the norm by itself.
    """
    worst = 0.0
    for x, y in zip(a, b, strict=False):
        if "Norm" not in x or "Norm" not in y:
            continue
        largest = max(abs(t[name]) for t in (x, y) for name in ("Max", "Min"))
        norm = max(x["Norm"], y["Norm"])
        scales = dict(zip(STATISTICS, (largest, largest, norm / math.sqrt(math.prod(x["shape"])), norm), strict=True))
        for name, scale in scales.items():
            if x[name] == y[name] or (math.isnan(x[name]) and math.isnan(y[name])):
                continue
            gap = abs(x[name] - y[name]) / scale if math.isfinite(scale) and scale else math.inf
            worst = max(worst, gap) if not math.isnan(gap) else math.inf
    return worst


def compare(a: dict, b: dict, limit: float | None = None) -> list[Row]:
    """The entries that both have in the same shapes, in the order in which A computed them.

    Shapes differ where a device's patch leaves out rows that change nothing, such as padding.
    """
    rows = []
    for key, (kind, entry) in a.items():
        if key not in b:
            continue
        other_kind, other = b[key]
        place, way, number = key
        for part in ("output",) if way == "forward" else [part for part in entry if part in other]:
            mine, its = entry.get(part, []), other.get(part, [])
            if not mine or [t["shape"] for t in mine] != [t["shape"] for t in its]:
                continue
            dtype = mine[0]["dtype"]
            rows.append(
                Row(
                    place if way != "parameters_grad" else f"{place}.{part}",
                    (kind, other_kind),
                    way,
                    number,
                    dtype.removeprefix("torch."),
                    "x".join(map(str, mine[0]["shape"])),
                    difference(entry.get("input_args", []), other.get("input_args", [])) if way == "forward" else 0.0,
                    difference(mine, its),
                    limit if limit is not None else LIMITS.get(dtype, LIMITS["torch.float32"]),
                )
            )
    return rows


def verdict(rows: list[Row]) -> str:
    """One sentence: the first module that parts, and whether it had the same input."""
    first = next((row for row in rows if row.parts), None)
    if first is None:
        return f"The two agree in all {len(rows)} places that both have in the same shapes."
    kinds = first.kinds[0] if first.kinds[0] == first.kinds[1] else f"{first.kinds[0]}, in B {first.kinds[1]}"
    text = f"They part first at **{first.place}** ({kinds}): {_WORDS[first.way]}"
    text += f" {first.place.rpartition('.')[2]}" if first.way == "parameters_grad" else ""
    text += f" differs by {first.made:.2g} (limit {first.limit:g})"
    if first.way == "forward":
        text += f", of inputs that differ by {first.given:.2g}"
    return text + "."


def page(a: str, b: str, rows: list[Row], alone: tuple[int, int]) -> str:
    """The Markdown page: the sentence, then the rows from the one before the first difference on."""
    begin = next((n for n, row in enumerate(rows) if row.parts), 0)
    shown = rows[max(0, begin - 1) : begin + ROWS]
    lines = ["# Where two runs part", "", f"- A: {a}", f"- B: {b}", "", verdict(rows), ""]
    if any(alone):
        lines += [f"Not compared: {alone[0]} entries that only A has, {alone[1]} that only B has.", ""]
    lines += ["| module | class | what | call | type, shape | inputs differ | it differs | parts |"]
    lines += ["|---|---|---|---|---|---|---|---|"]
    for row in shown:
        given = f"{row.given:.2g}" if row.way == "forward" else ""
        lines.append(
            f"| {row.place} | {row.kinds[0]} | {row.way} | {row.number} | {row.dtype} {row.shape} | {given} | "
            f"{row.made:.2g} | {'yes' if row.parts else ''} |"
        )
    return "\n".join([*lines, ""])


@print_usage_errors
def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("a", help="folder of a run, or its dump.json: the reference")
    parser.add_argument("b", help="likewise, what is to be judged")
    parser.add_argument("--rank", type=int, default=0, help="whose dump is read")
    parser.add_argument("--limit", type=float, help="largest relative difference; by default by type, 2e-5 in fp32")
    parser.add_argument("--output", type=Path, help="Markdown file")
    options = parser.parse_args(argv)
    if options.limit is not None and not 0 <= options.limit < math.inf:
        raise UsageError(f"--limit {options.limit}: a relative difference is a number of at least 0")
    if Path(options.a).resolve() == Path(options.b).resolve():
        raise UsageError(f"{options.a}: A and B are the same dump, which says nothing: give that of another run")
    if options.output and (options.output.is_dir() or not options.output.absolute().parent.is_dir()):
        raise UsageError(f"--output {options.output}: name a file in a folder that exists")
    a, b = read(options.a, options.rank), read(options.b, options.rank)
    rows = compare(a, b, options.limit)
    if not rows:
        raise UsageError(f"{options.a}, {options.b}: no module is in both dumps: give two runs of one model")
    text = page(options.a, options.b, rows, (len(a.keys() - b.keys()), len(b.keys() - a.keys())))
    if options.output:
        options.output.write_text(text, encoding="utf-8")
    print(text)
    return int(any(row.parts for row in rows))


if __name__ == "__main__":
    sys.exit(main())
