"""data2vec's fine-tuning on the simulated npu device: the CPU's losses, resumed; no step waits for the device."""

import json

import pytest
from tokenizers.pre_tokenizers import ByteLevel

from ci.gates import forked_ranks
from ci.npu import fake as fake_npu
from ci.training_cases import ROOT

pytestmark = pytest.mark.skipif(fake_npu.why_missing() is not None, reason=str(fake_npu.why_missing()))

PROJECT = ROOT / "Data2vec_for_PyTorch"
STEPS, STOP = 8, 4
SIZES = {"embed_dim": 32, "ffn_embed_dim": 64, "layers": 2, "attention_heads": 4}


def write_vocabulary(folder):
    """encoder.json, vocab.bpe and dict.txt of single bytes; their overrides."""
    letters = sorted(ByteLevel.alphabet())
    (folder / "encoder.json").write_text(json.dumps({letter: i for i, letter in enumerate(letters)}))
    (folder / "vocab.bpe").write_text("#version: 0.2\n")
    (folder / "dict.txt").write_text("".join(f"{i} 1\n" for i in range(len(letters))))
    names = {"encoder_json": "encoder.json", "vocab_bpe": "vocab.bpe", "dict": "dict.txt"}
    return [f"task.{key}={folder / name}" for key, name in names.items()]


def losses(folder, kind):
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return {line["step"]: line["loss"] for line in lines if line["kind"] == kind}


def test_fine_tuning_has_the_losses_of_the_cpu(tmp_path):
    common = ["--config-name", "demo", f"task.data={PROJECT / 'test/golden/questions'}", "task.label_column=kind"]
    common += [*write_vocabulary(tmp_path), "task.max_positions=48", "dataset.num_workers=0", "optimization.lr=[0.003]"]
    common += [f"model.transformer.encoder.{key}={value}" for key, value in SIZES.items()]
    common += [
        "model.transformer.dropout=0",
        "model.transformer.attention_dropout=0",
    ]  # drawn on the device
    common += [f"optimization.max_update={STEPS}", "--log_every", str(STOP), "--save_every", str(STOP)]

    def arguments(name, device, steps, *more):
        options = ["--output_dir", str(tmp_path / name), "--device", device, "--max_steps", str(steps)]
        return 1, [*common, *options, *more]

    commands = [
        arguments("cpu", "cpu", STEPS),
        arguments("npu", "npu", STOP),
        arguments("npu", "npu", STEPS),
        arguments("bf16", "npu", STOP, "--precision", "bf16"),
    ]
    environment = fake_npu.environment(tmp_path / "report")
    environment.pop("OMP_NUM_THREADS")
    done = forked_ranks.run(PROJECT / "finetune.py", ("sklearn.metrics",), *commands, **environment)
    assert done.returncode == 0, done.stdout[-6000:]
    for kind in ("train", "valid"):
        expected = losses(tmp_path / "cpu", kind)
        assert list(expected) == [STOP, STEPS]
        assert losses(tmp_path / "npu", kind) == pytest.approx(expected, rel=1e-5, abs=1e-6), kind
    assert losses(tmp_path / "bf16", "valid")[STOP] == pytest.approx(losses(tmp_path / "cpu", "valid")[STOP], rel=0.02)
    reports = [r for r in fake_npu.read_reports(tmp_path / "report") if r.steps == STOP]
    assert len(reports) == 3
    events = [event for report in reports for event in report.between(STOP, STOP)]
    known = {f"aten::index_{name} bfloat16" for name in ("add", "copy")}  # README: their rows name no bf16
    assert not [e for e in events if e.kind != "undocumented_type" or e.operator not in known], events
