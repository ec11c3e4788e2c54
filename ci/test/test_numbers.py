"""Numbers on the pages are those of the files that `make` writes: demos' in ci/baselines/outcomes, speed's in .../cpu.

The Chinese pages have the English tables' numbers (test_languages.py); docs/performance.md's table is test_peers.py's.
"""

import json
import re
from pathlib import Path

import pytest

from ci.gates.outcomes import gate
from ci.peers import table

ROOT = Path(__file__).resolve().parents[2]
VIT, BEIT2, CLIP, DATA2VEC = (f"{name}_for_PyTorch" for name in ("ViT", "Beit2", "CLIP", "Data2vec"))
# project, metric -> where its mean stands: page, beginning of the line
SHOWN = {
    (VIT, "top1"): [("README.md", "| ViT, nine groups"), (f"{VIT}/README.md", "| held-out families")],
    (VIT, "top1_other_artist"): [("README.md", "| the same, drawn"), (f"{VIT}/README.md", "| the same by an artist")],
    (BEIT2, "pretrained"): [("README.md", "| BEiT v2, a tenth"), (f"{BEIT2}/README.md", "| 18.0 |")],
    (CLIP, "text_to_image_R@1"): [
        ("README.md", "| CLIP, unseen combinations"),
        (f"{CLIP}/README.md", "| unseen combination, text to image R@1 |"),
    ],
    (CLIP, "text_to_image_R@10"): [(f"{CLIP}/README.md", "| unseen combination, text to image R@10 |")],
    (CLIP, "image_to_text_R@1"): [(f"{CLIP}/README.md", "| unseen combination, image to text R@1 |")],
    (CLIP, "image_to_text_R@10"): [(f"{CLIP}/README.md", "| unseen combination, image to text R@10 |")],
    (DATA2VEC, "probe"): [
        ("README.md", "| data2vec, text"),
        (f"{DATA2VEC}/README.md", "| linear probe after the demo"),
    ],
    (DATA2VEC, "teacher_probe"): [(f"{DATA2VEC}/README.md", "| linear probe after the demo")],
    (DATA2VEC, "pictures_cloze"): [(f"{DATA2VEC}/README.md", "| cloze retrieval of the same")],
}
PEERS = {
    **{"vit_step_fp32": "timm", "beit2_step_fp32": "", "data2vec_step_fp32": "plain", "clip_step_upstream": ""},
    **{"vit_step_bf16": "timm", "beit2_step_bf16": "", "data2vec_step_bf16": "plain", "clip_step_bf16_upstream": ""},
}


def outcomes(project: str) -> dict:
    return json.loads((ROOT / "ci" / "baselines" / "outcomes" / f"{project}.json").read_text())["metrics"]


def test_what_each_demo_is_judged_by_is_shown():
    """Of each project one metric at least; the gate has others of its own, such as those of an early evaluation."""
    assert set(SHOWN) <= {(project, metric) for project in gate.METRICS for metric in outcomes(project)}
    assert {project for project, _ in SHOWN} == set(gate.METRICS)


@pytest.mark.parametrize(("project", "metric"), SHOWN, ids=lambda value: value)
def test_the_pages_have_the_demo_s_numbers(project, metric):
    """The mean of the seeds in each place, and where the line has them in brackets, the seeds."""
    stored = outcomes(project)[metric]
    for page, begins in SHOWN[project, metric]:
        (line,) = (text for text in (ROOT / page).read_text(encoding="utf-8").splitlines() if text.startswith(begins))
        numbers = [float(text) for text in re.findall(r"\d+\.\d+", line)]
        assert any(abs(number - stored["mean"]) < 0.06 for number in numbers), (page, line, stored["mean"])
        seeds = [[float(n) for n in group] for group in re.findall(r"\((\d+\.\d), (\d+\.\d), (\d+\.\d)\)", line)]
        if seeds and metric != "teacher_probe":  # which stands in the student's line, as a mean
            near = [all(abs(a - b) < 0.06 for a, b in zip(three, stored["values"], strict=True)) for three in seeds]
            assert any(near), (page, line, stored["values"])


@pytest.mark.parametrize("page", ["README.md", "README.zh-CN.md"])
def test_the_front_page_has_the_measured_speeds(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    for name, peer in PEERS.items():
        result = json.loads((ROOT / "ci" / "baselines" / "cpu" / f"{name}.json").read_text())
        ratio = next(c.median for c in table.comparisons(name, result) if peer in c.peer)
        said = [float(number) for number in re.findall(r"\d\.\d\d", text)]
        assert any(abs(ratio - number) < 0.006 for number in said), (name, ratio)


def test_the_long_proof_s_table_is_its_result():
    text = (ROOT / "docs" / "experiments.md").read_text(encoding="utf-8")
    table = text.split("## CIFAR-10: the long proof")[1].split("\n## ")[0]
    result = json.loads((ROOT / "ci" / "baselines" / "long_proof" / "cifar10_cpu.json").read_text())["top1"]
    begins = {name: f"| {name.split(',')[0]}" for name in result if name != "guessing"}
    begins["the same from scratch"] = "| the same from scratch"
    for method, line in begins.items():
        (row,) = (text for text in table.splitlines() if text.startswith(line))
        cells = [re.match(r" ?(\d+\.\d)", cell) for cell in row.split("|")[2:-1]]
        shown = [float(cell[1]) for cell in cells if cell]
        assert len(shown) == len(result[method])
        assert all(abs(a - b) < 0.051 for a, b in zip(shown, result[method].values(), strict=True)), method
