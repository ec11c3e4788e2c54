"""data2vec on pictures, on the simulated npu device: it trains and resumes on two ranks with the CPU's losses, also in
bf16, and evaluates; a step in the middle of a run does not wait for the device. data2vec 2.0 likewise."""

import json
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

from ci.gates import forked_ranks
from ci.npu import fake as fake_npu
from ci.training_cases import ROOT, write_pictures

pytestmark = pytest.mark.skipif(fake_npu.why_missing() is not None, reason=str(fake_npu.why_missing()))

PROJECT = ROOT / "Data2vec_for_PyTorch"
STEPS, STOP = 8, 4  # of a whole run (an epoch of 64 pictures), of one that is cut off
EXACT = {"rel": 1e-5, "abs": 1e-6}
# what draws on the device is off: its stream is its own
CONFIG = ["--config-dir", str(PROJECT / "test"), "--config-name", "tiny_vision", "model.drop_path=0"]
CONFIG += ["model.attention_dropout=0", f"optimization.max_update={STEPS}"]


MULTI = ["--config-dir", str(PROJECT / "test"), "--config-name", "tiny_multi_vision", "model.end_drop_path_rate=0"]
MULTI += [f"model.{name}=0" for name in ("encoder_dropout", "attention_dropout", "post_mlp_drop")]
MULTI += [f"model.modalities.image.{name}=0" for name in ("mask_noise_std", "decoder.input_dropout")]


@dataclass
class Runs:
    """Folders below `root`: `cpu` whole, `npu` cut off and resumed, `bf16` cut off, `multi_cpu` whole, `multi_npu`
    cut off; what the ranks 0 printed."""

    root: Path
    output: str
    steady_events: list[fake_npu.Event]

    def losses(self, name: str, kind: str = "train") -> dict[int, float]:
        """By the last update of each STOP updates; kind "val" for the validation's."""
        lines = map(json.loads, (self.root / name / "metrics.jsonl").read_text().splitlines())
        return {line["step"]: line["loss"] for line in lines if line["kind"] == kind}


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Runs:
    root = tmp_path_factory.mktemp("vision")
    write_pictures(root / "data", 64)
    (root / "data" / "val").symlink_to(root / "data" / "train")
    common = [f"task.data={root / 'data'}", "--log_every", str(STOP), "--save_every", str(STOP)]

    def arguments(name: str, device: str, steps: int, *more: str) -> tuple[int, list[str]]:
        output = ["--output_dir", str(root / name), "--device", device, "--max_steps", str(steps)]
        config = [*MULTI, f"optimization.max_update={STEPS}"] if name.startswith("multi") else CONFIG
        return 2, [*config, *common, *output, *more]

    commands = [
        arguments("cpu", "cpu", STEPS),
        arguments("npu", "npu", STOP),
        arguments("npu", "npu", STEPS),
        arguments("bf16", "npu", STOP, "--precision", "bf16", "model.attention_dropout=0.1"),
        arguments("multi_cpu", "cpu", STEPS),
        arguments("multi_npu", "npu", STOP),
    ]
    environment = fake_npu.environment(root / "report")
    environment.pop("OMP_NUM_THREADS")
    late = ("data2vec.data.image_data", "data2vec.model.vision_model")
    done = forked_ranks.run(PROJECT / "train.py", late, *commands, **environment)
    assert done.returncode == 0, done.stdout[-6000:]
    reports = [r for r in fake_npu.read_reports(root / "report") if r.steps == STOP]
    assert len(reports) == 2 * 4  # two ranks each, without the CPU's
    return Runs(root, done.stdout, [event for r in reports for event in r.between(STOP, STOP)])


def test_training_that_is_resumed_has_the_losses_of_the_cpu(runs):
    for kind in ("train", "val"):
        expected = runs.losses("cpu", kind)
        assert list(expected) == [STOP, STEPS]
        assert runs.losses("npu", kind) == pytest.approx(expected, **EXACT), kind
    assert f"epoch 1, update {STOP}" in runs.output


def test_the_second_version_has_the_losses_of_the_cpu(runs):
    for kind in ("train", "val"):
        expected = runs.losses("multi_cpu", kind)[STOP]
        assert runs.losses("multi_npu", kind)[STOP] == pytest.approx(expected, **EXACT), kind


def test_bf16_is_near_and_tells_the_free_memory_as_fairseq_does(runs):
    assert runs.losses("bf16", "val")[STOP] == pytest.approx(runs.losses("cpu", "val")[STOP], rel=0.02)
    lines = [json.loads(text[text.index("{") :]) for text in runs.output.splitlines() if "[train_inner]" in text]
    assert ["gb_free" in line for line in lines] == [False] * 2 + [True] * 3 + [False] * 2 + [True]
    assert 0 < float(lines[-1]["gb_free"]) < 1024


def test_a_step_does_not_wait_for_the_device(runs):
    """No wait of the host, no shape that depends on values, no float64 and no type without documentation."""
    assert not runs.steady_events, "\n".join(map(str, runs.steady_events))


def test_the_evaluation_script_runs(runs):
    """On the picture folders, with the loss that the training run ended with."""
    checkpoint = runs.root / "npu" / "checkpoints" / "checkpoint_last.pt"
    flags = [f"--data_path={runs.root / 'data'}", f"--checkpoint_path={checkpoint}", "--device=npu"]
    flags += [f"--config_dir={PROJECT / 'test'}", "--config_name=tiny_vision", "--subset=val"]
    flags += [f"--output_dir={runs.root / 'evaluation'}", "--precision=fp32"]
    command = ["bash", "test/train_eval_1p.sh", *flags]
    done = subprocess.run(command, cwd=PROJECT, env=fake_npu.environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert runs.losses("evaluation", "val")[STEPS] == pytest.approx(runs.losses("npu", "val")[STEPS], **EXACT)
