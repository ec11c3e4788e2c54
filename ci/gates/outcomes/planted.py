"""Faults of learning, planted into the demos: does the gate see them?

A demo runs from the gate's first seed with one fault in its training, until the numbers are there that must fall: early
ones (ci/yardsticks/early.py), or those of a step before the end. It is caught where one of them is below the limit that
the gate has for it. Nothing of a fault is in the projects: it is an option on a script's command line, or a patch that
`plant/sitecustomize.py` puts on when Python starts.
"""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ci.yardsticks.early import EARLY
from ci.yardsticks.report import read_evaluations

ROOT = Path(__file__).resolve().parents[3]
PLANT = Path(__file__).with_name("plant")
PATIENCE = 2.0  # seconds between two looks at a run's numbers
SHUFFLED = "{shuffled captions}"  # in arguments: a table of the training pairs whose captions belong to other pictures

Numbers = dict[str, float]


@dataclass(frozen=True)
class Fault:
    """What is wrong, where, and when it should have shown.

    Attributes:
        script: whose process has the fault.
        arguments: that its command line gets.
        patch: function of plant/sitecustomize.py.
        reader: (folder of the demo) -> its numbers, empty as long as it has none; the demo ends when there are some.
    """

    project: str
    script: str
    reader: Callable[[Path], Numbers]
    arguments: tuple[str, ...] = ()
    patch: str = ""


def _early(project: str) -> Callable[[Path], Numbers]:
    def read(folder: Path) -> Numbers:
        file = folder / "metrics.jsonl"
        return EARLY[project].read(read_evaluations(file)) if file.exists() else {}

    return read


def masked_tokens(folder: Path) -> Numbers:
    """What BEiT v2's demo says after its pretraining."""
    file = folder / "predictions.txt"
    found = re.search(r"predicted right: ([\d.]+) %;", file.read_text(encoding="utf-8")) if file.exists() else None
    return {"masked_tokens": float(found[1])} if found else {}


def _probe(part: str, row: str, metric: str) -> Callable[[Path], Numbers]:
    """A row of what data2vec's probe.py says of the trained model in a part of its demo, text or pictures."""

    def read(folder: Path) -> Numbers:
        file = folder / part / "probe.txt"
        text = file.read_text(encoding="utf-8") if file.exists() else ""
        found = re.search(rf"^{row} +[\d.]+ +([\d.]+)$", text, re.MULTILINE)
        return {metric: float(found[1])} if found else {}

    return read


BEIT2, CLIP, DATA2VEC, VIT = (f"{name}_for_PyTorch" for name in ("Beit2", "CLIP", "Data2vec", "ViT"))
_BEIT2_PRETRAINING = "run_beitv2_pretraining.py"
FAULTS = {
    "learning rate / 10": Fault(VIT, "run_vit.py", _early(VIT), ("optimizer.base_lr=8e-4",)),
    "captions shuffled": Fault(CLIP, "run_clip.py", _early(CLIP), ("--train_file", SHUFFLED)),
    "one tower frozen": Fault(CLIP, "run_clip.py", _early(CLIP), ("--freeze_vision_model",)),
    "masks ignored": Fault(BEIT2, _BEIT2_PRETRAINING, masked_tokens, patch="masks_ignored"),
    "relative bias dropped": Fault(BEIT2, _BEIT2_PRETRAINING, masked_tokens, ("--disable_rel_pos_bias",)),
    "teacher frozen": Fault(
        DATA2VEC,
        "train.py",
        _probe("text", "teacher's probe", "teacher_probe"),
        ("model.ema_decay=1", "model.ema_end_decay=1"),
    ),
    "picture masks ignored": Fault(
        DATA2VEC, "train.py", _probe("pictures", "cloze retrieval", "pictures_cloze"), patch="picture_masks_ignored"
    ),
}


def run(name: str, seed: int, data: Path, folder: Path) -> Numbers:
    """The numbers of a demo with the fault of this name; empty where it ended without. Its output is in demo.txt."""
    fault = FAULTS[name]
    folder.mkdir(parents=True)
    arguments = [_shuffled(data, folder) if part == SHUFFLED else part for part in fault.arguments]
    planted = {
        "PLANTED_SCRIPT": fault.script,
        "PLANTED_ARGUMENTS": json.dumps(arguments),
        "PLANTED_PATCH": fault.patch,
        "PYTHONPATH": str(PLANT),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
    }
    command = ["bash", str(ROOT / fault.project / "test" / "demo.sh"), str(data), str(folder), str(seed)]
    with open(folder / "demo.txt", "w") as log:
        demo = subprocess.Popen(
            command, env=os.environ | planted, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            numbers: Numbers = {}
            while not numbers and demo.poll() is None:
                time.sleep(PATIENCE)
                numbers = fault.reader(folder)
            return numbers or fault.reader(folder)
        finally:
            if demo.poll() is None:
                os.killpg(demo.pid, signal.SIGTERM)
                demo.wait()


def _shuffled(data: Path, folder: Path) -> str:
    """A copy of the captioned emoji's training table in which every picture has another's captions."""
    rows = [json.loads(line) for line in (data / "captioned_emoji" / "train.jsonl").read_text("utf-8").splitlines()]
    captions = [row["caption"] for row in rows]
    random.Random(0).shuffle(captions)
    table = folder / "shuffled.jsonl"
    lines = (json.dumps(row | {"caption": c}) + "\n" for row, c in zip(rows, captions, strict=True))
    table.write_text("".join(lines), encoding="utf-8")
    return str(table)


def table(rows: Sequence[tuple[str, str, float, float]]) -> str:
    """Markdown of (fault, metric, value, limit): a row a number that was to fall."""
    text = "| planted fault | metric | value | limit | caught |\n|---|---|---|---|---|\n"
    for name, metric, value, limit in rows:
        text += f"| {name} | {metric} | {value:.2f} | {limit:.2f} | {'NO' if value >= limit else 'yes'} |\n"
    return text


def caught(rows: Sequence[tuple[str, str, float, float]]) -> set[str]:
    """The faults of which at least one number fell below its limit."""
    return {name for name, _, value, limit in rows if not value >= limit}
