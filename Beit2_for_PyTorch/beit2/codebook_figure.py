"""A figure of how many codes a tokenizer's training used, epoch by epoch."""

from __future__ import annotations

import json
from pathlib import Path

from common.distributed import World
from common.run import figures

NAME = "codebook_use.png"


def codebook_use(folder: Path, codes: int, steps: int) -> dict[str, list[tuple[float, float]]]:
    """Curves of (epoch, codes) by name, from a run's metrics.jsonl.

    Args:
        codes: of the codebook.
        steps: of an epoch.
    """
    used = {"train_unused_codes": "used in training", "unused_code": "used by held-out pictures"}
    curves: dict[str, list[tuple[float, float]]] = {}
    for text in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        line = json.loads(text)
        if line["kind"] != "eval" or "train_unused_codes" not in line:
            continue
        for key, name in used.items():
            if key in line:
                curves.setdefault(name, []).append((line["step"] / steps, codes - line[key]))
        if "train_perplexity" in line:
            curves.setdefault("used as evenly as", []).append((line["step"] / steps, line["train_perplexity"]))
    return curves


def draw_codebook_use(folder: Path, codes: int, steps: int, world: World) -> None:
    """Writes `codebook_use.png` into the run's folder; nothing where no epoch was finished."""
    curves = codebook_use(folder, codes, steps) if world.is_main else {}
    if not curves:
        return
    figure, axes = figures.new((6, 4))
    for name, points in curves.items():
        axes.plot(*zip(*points, strict=True), marker=".", label=name)
    axes.axhline(codes, color="grey", linestyle=":", label="in the codebook")
    axes.set(xlabel="epoch", ylabel="codes", ylim=(0, 1.05 * codes))
    axes.legend()
    figures.save(figure, folder / NAME)
