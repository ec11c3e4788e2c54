"""Numbers that are none on one rank, and files that a stranger has made."""

from __future__ import annotations

import json
import os
import pickle
import random
import shutil
import struct
import zlib
from pathlib import Path

from ci.faults.runs import PLANT, NotHere, Runs, Trial, one_line, states


def numbers(runs: Runs, draw: random.Random, whole: dict[int, float]) -> list[str]:
    """nan on one rank ends all of them in one sentence; --replay runs that batch; the same command goes on."""
    output, step = runs.folder / f"output{runs.number}", draw.randrange(2, runs.script.last // 2)
    plant = {"PYTHONPATH": str(PLANT), "FAULT_RANK": str(draw.randrange(2)), "FAULT_PASS": str(step)}
    code, said = runs.run(output, environment=plant)
    problems = one_line(said, "inf or nan", f"at step {step}", "(samples ") + (
        [] if code == 1 else [f"exit code {code}"]
    )
    if states(output) != {"FAILED"}:
        problems.append(f"Status {states(output)}")
    record = output / "replay.json"
    if not record.exists() or json.loads(record.read_text())["step"] != step:
        return [*problems, "no replay.json of that step"]
    code, said = runs.run(output, "--replay", str(record))
    if code != 0 or f"replay of step {step}: finite" not in said:
        problems.append(f"--replay: exit code {code}: {said[-300:]}")
    return problems + runs.goes_on(output, whole)


class _Touch:
    """A pickle that runs code when it is loaded."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def hostile_weights(runs: Runs, draw: random.Random, whole: dict[int, float]) -> list[str]:
    """A page, a pointer, a pickle with code, half a file, nothing, saved as weights: refused by name, no code run."""
    ran = runs.folder / f"ran{runs.number}"
    kinds = {
        "page": b"<!DOCTYPE html><html><body>404</body></html>",
        "error": b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>',
        "pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
        "pickle": pickle.dumps(_Touch(ran)),
        "cut": b"PK\x03\x04" + bytes(draw.randrange(256) for _ in range(99)),
        "empty": b"",
    }
    name = draw.choice(sorted(kinds))
    folder = runs.folder / f"hostile{runs.number}"
    file = folder / "weights.pth"
    if "CLIP" in runs.project:  # a folder of transformers
        shutil.copytree(runs.data / "clip-roberta", folder)
        file = folder / "model.safetensors"
    folder.mkdir(exist_ok=True)
    file.write_bytes(kinds[name])
    more = [word.format(file=file, model=folder) for word in runs.script.weights]
    code, said = runs.run(runs.folder / f"output{runs.number}", *more)
    problems = one_line(said, str(folder)) + ([] if code == 2 else [f"exit code {code}"])
    return [f"{name}: {problem}" for problem in problems] + (["its code was run"] if ran.exists() else [])


def hostile_pictures(runs: Runs, draw: random.Random, whole: dict[int, float]) -> list[str]:
    """Half a picture, one of 10^10 pixels, litter, a link in a circle: refused by name, or left out with a word."""
    if "Data2vec" in runs.project:
        raise NotHere("its case has no pictures")
    data = runs.folder / f"data{runs.number}"
    shutil.copytree(runs.data, data)
    target = draw.choice(sorted((data / "train").rglob("*.png")))
    kind = draw.choice(["half", "huge", "litter", "circle"])
    if kind == "half":
        target.write_bytes(target.read_bytes()[: target.stat().st_size // 2])
    elif kind == "huge":
        target.write_bytes(huge_png())
    elif kind == "litter":
        (target.parent / "._0.png").write_bytes(b"\x00\x05\x16\x07")
        (target.parent.parent / "__MACOSX").mkdir()
    else:
        (target.parent / "circle").symlink_to(target.parent, target_is_directory=True)
    others = Runs(runs.project, data, runs.number, runs.folder)
    code, said = others.run(runs.folder / f"output{runs.number}")
    runs.number = others.number
    shutil.rmtree(data)
    if kind in ("litter", "circle") and code != 0:
        return [f"{kind}: exit code {code}: {said[-300:]}"]
    problems = [] if target.name in said or kind in ("litter", "circle") else ["it is not named"]
    problems += one_line(said, target.name) if code else []
    return [f"{kind}: {problem}" for problem in problems + ([] if code in (0, 1, 2) else [f"exit code {code}"])]


def huge_png() -> bytes:
    """The head of a picture of 100,000 x 100,000 pixels."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    head = struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


CONTENTS: dict[str, Trial] = {
    "nan on a rank": numbers,
    "hostile weights": hostile_weights,
    "hostile picture": hostile_pictures,
}
