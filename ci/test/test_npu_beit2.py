"""BEiT v2's other scripts on the simulated npu device, two ranks each: tokenizer training, fine-tuning and linear probe
have the CPU's losses when they are cut off and resumed there, and a step waits for the device nowhere."""

import json
from dataclasses import dataclass
from pathlib import Path

import pytest

from ci.gates import forked_ranks
from ci.npu import fake as fake_npu
from ci.training_cases import ROOT, write_pictures

pytestmark = pytest.mark.skipif(fake_npu.why_missing() is not None, reason=str(fake_npu.why_missing()))

STEPS, STOP = 8, 4  # of an epoch and of a run that is cut off; there is a log line after each STOP steps
STEADY = (4, STOP)  # of a process's steps; DDP rebuilds its buckets before the third, a log line counts to the next
EXACT = {"rel": 1e-5, "abs": 1e-6}

# One process imports all and forks every rank: a script's name first, then its arguments.
SCRIPTS = f"""
import sys

sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "Beit2_for_PyTorch")!r}, {str(ROOT / "Beit2_for_PyTorch/test")!r}]
import small_models
import timm.optim
import torch
import beit2
import run_class_finetuning
import run_linear_eval
import run_vqkd_training
from beit2.model.teachers import build_teacher


def write_weights(folder):
    torch.manual_seed(0)
    teacher = build_teacher({{"width": 64, "layers": 1, "heads": 1, "output_dim": 12, "patch": 8, "res": 32}})
    torch.save(teacher.state_dict(), folder + "/teacher.pt")
    model = beit2.create_model("beit_test_cls_pt", img_size=32, vocab_size=32, early_layers=2, head_layers=1)
    for name, parameter in model.named_parameters():
        if any(part in name for part in ("table", "mlp", "gamma")):  # large enough for the two forms of GELU to differ
            torch.nn.init.normal_(parameter)
    torch.save({{"model": model.state_dict()}}, folder + "/pretrained.pth")


def main(arguments):
    name, *rest = arguments
    sys.argv[0] = name  # which the device's report notes
    return write_weights(*rest) if name == "write_weights" else sys.modules[name].main(rest)
"""

OPTIONS = {
    "run_vqkd_training": "--model vqkd_test_clip --codebook_n_emd 32 --codebook_emd_dim 8 --quantize_kmeans_init "
    "--teacher_weight {root}/teacher.pt --opt_betas 0.9 0.99 --warmup_epochs 0",
    "run_class_finetuning": "--model beit_test_classifier --finetune {root}/pretrained.pth --layer_decay 0.65 "
    "--mixup 0.8 --cutmix 1.0 --model_ema --warmup_epochs 0 --drop_path 0 --init_scale 1",
    "run_linear_eval": "--model beit_test_classifier --pretrained_weights {root}/pretrained.pth --lr 1e-2",
}
COMMON = (
    "--data_path {root}/data/train --eval_data_path {root}/test/train --input_size 32 --batch_size 4 --epochs 1 "
    "--num_workers 0 --precision fp32"
)


@dataclass
class Runs:
    """The folder with `<script>-cpu` and `<script>-npu`, and what the resumed ranks reported, by script."""

    root: Path
    reports: dict[str, list[fake_npu.Report]]


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Runs:
    root = tmp_path_factory.mktemp("beit2")
    (root / "scripts.py").write_text(SCRIPTS)
    write_pictures(root / "data", 2 * 4 * STEPS, side=40)
    write_pictures(root / "test", 10, side=40)
    commands = [(1, ["write_weights", str(root)])]
    for name, options in OPTIONS.items():
        words = f"{name} {options} {COMMON} --log_every {STOP}".format(root=root).split()
        for device, *more in (("cpu",), ("npu", "--max_steps", str(STOP)), ("npu",)):
            output = str(root / f"{name}-{device}")
            commands.append((2, [*words, "--device", device, "--output_dir", output, *more]))
    environment = fake_npu.environment(root / "report")
    environment.pop("OMP_NUM_THREADS")
    done = forked_ranks.run(root / "scripts.py", (), *commands, **environment)
    assert done.returncode == 0, done.stdout[-6000:]
    reports = [report for report in fake_npu.read_reports(root / "report") if report.steps == STOP]
    return Runs(root, {name: [report for report in reports if report.program == name] for name in OPTIONS})


def lines(folder: Path, kind: str) -> list[dict]:
    found = [json.loads(text) for text in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in found if line["kind"] == kind]


def evaluation(folder: Path) -> dict[str, float]:
    last = lines(folder, "eval")[-1]
    return {name: value for name, value in last.items() if name not in ("kind", "cpu_s")}


@pytest.mark.parametrize("script", OPTIONS)
def test_losses_and_evaluation_are_the_cpu_s(runs, script):
    ours, expected = (lines(runs.root / f"{script}-{device}", "train") for device in ("npu", "cpu"))
    assert [line["step"] for line in ours] == [line["step"] for line in expected] == [STOP, STEPS]
    for line, other in zip(ours, expected, strict=True):
        assert line["loss"] == pytest.approx(other["loss"], **EXACT)
        assert line["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-3, abs=1e-5)
    ours, expected = (evaluation(runs.root / f"{script}-{device}") for device in ("npu", "cpu"))
    assert ours == pytest.approx(expected, **EXACT)
    assert any("loss" in name or "acc1" in name for name in expected)


@pytest.mark.parametrize("script", OPTIONS)
def test_a_step_does_not_wait_for_the_device(runs, script):
    """Nor does it make a shape from values, or use float64 or an undocumented type."""
    assert len(runs.reports[script]) == 2 * 2  # two ranks of the run that was cut off and of the one that went on
    events = [event for report in runs.reports[script] for event in report.between(*STEADY)]
    assert not events, "\n".join(map(str, events))
