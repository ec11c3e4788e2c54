"""LoRA: what is trained, what a checkpoint holds, and that the merged weights are a plain model of the same answers."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import run_vit
import vit
from ci.gates.forked_ranks import run
from common import checkpoint_file
from common.errors import UsageError
from vit.model import lora
from vit.weights import loading as weights

LORA = ["model.train=lora", "model.lora_rank=3", "model.lora_alpha=5", "model.lora_layers=qkv,fc2", "model.lora_also="]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    root = tmp_path_factory.mktemp("pictures")
    generator = np.random.default_rng(0)
    for index in range(24):
        path = root / ("val" if index % 3 == 0 else "train") / ("ant", "bee")[index % 2] / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (24, 24, 3), dtype=np.uint8)).save(path)
    return root


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A pretrained stand-in with another head."""
    torch.manual_seed(0)
    model = vit.create_model("vit_demo", 5, img_size=16)
    return vit.save_pretrained(model, tmp_path_factory.mktemp("base") / "m")


def words(pictures, base, output, *more: str) -> list[str]:
    given = ["--run_mode", "finetune", "--train_dataset_dir", f"{pictures}/train", "--eval_dataset_dir"]
    given += [f"{pictures}/val", "--load_checkpoint", str(base), "--output_dir", str(output), "--device", "cpu"]
    given += ["--batch_size", "4", "--num_workers", "0", "--epochs", "2", "optimizer.base_lr=0.1"]
    return [*given, "model.name=auto", "optimizer.warmup_epochs=0", *LORA, *more]


def train(pictures, base, output, *more: str) -> None:
    run_vit.main(words(pictures, base, output, *more))


def test_only_the_additions_and_the_head_are_trained_and_the_merged_weights_are_plain(pictures, base, tmp_path):
    train(pictures, base, tmp_path)
    whole = checkpoint_file.load(tmp_path / "checkpoints" / "checkpoint-8.pt")
    state, before = whole["model"], weights.read_state_dict(base)
    for name, tensor in state.items():
        plain = name.replace(".base_layer.", ".")
        if plain in before and not name.startswith("head."):
            assert torch.equal(tensor, before[plain]), name
    added = {name for name in state if "lora_" in name}
    assert len(added) == 2 * 2 * 4 and all(".qkv." in name or ".fc2." in name for name in added)
    assert all(state[name].abs().max() > 0 for name in added), "lora_B starts at 0: it was trained"

    merged = weights.read_state_dict(tmp_path / "checkpoints" / "checkpoint-8.pt")
    assert merged.keys() == before.keys() and not torch.equal(
        merged["blocks.0.attn.qkv.weight"], before["blocks.0.attn.qkv.weight"]
    )
    model = vit.AutoModel.from_pretrained(tmp_path / "checkpoints" / "checkpoint-8.pt")
    with_parts = vit.AutoModel.from_pretrained(tmp_path / "checkpoints" / "checkpoint-8.pt")
    lora.add(with_parts, 3, 5, "qkv,fc2")
    with_parts.load_state_dict(state)
    images = torch.randn(3, 3, 16, 16)
    torch.testing.assert_close(model(images), with_parts(images), rtol=1e-5, atol=1e-6)
    best = checkpoint_file.load(tmp_path / "checkpoints" / "best.pt")["model"]
    assert best.keys() == before.keys()

    logged = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    run_vit.main(
        ["--run_mode", "eval", "--eval_dataset_dir", f"{pictures}/val", "--load_checkpoint", str(tmp_path), "--device"]
        + ["cpu", "--num_workers", "0", "--output_dir", str(tmp_path / "eval")]
    )
    result = next((tmp_path / "eval").glob("*.log")).read_text()
    assert f"Top1 = {max(line['correct'] for line in logged if line['kind'] == 'eval')}" in result


def test_a_run_with_lora_is_resumed_and_its_settings_are_part_of_it(pictures, base, tmp_path):
    train(pictures, base, tmp_path / "whole")
    train(pictures, base, tmp_path / "parts", "max_steps=3")
    with pytest.raises(UsageError, match="lora.lora_rank was 3, is now 4"):
        train(pictures, base, tmp_path / "parts", "model.lora_rank=4", "--resume_training")
    train(pictures, base, tmp_path / "parts", "--resume_training")
    whole, parts = (checkpoint_file.load(tmp_path / n / "checkpoints" / "checkpoint-8.pt") for n in ("whole", "parts"))
    assert all(torch.equal(whole["model"][name], parts["model"][name]) for name in whole["model"])


def test_several_ranks_ddp_and_fsdp_end_with_the_weights_of_one(pictures, base, tmp_path):
    # the ranks' own draws are off, so that any number of ranks sees the same samples
    more = ["data.mixup=0", "data.cutmix=0", "model.drop_path=0", "optimizer.ema_decay=0.5", "--batch_size"]

    def options(name: str, batch: int, *rest: str) -> list[str]:
        return words(pictures, base, tmp_path / name, *more, str(batch), *rest)

    done = run(
        Path(run_vit.__file__),
        ["vit.engine", "peft"],
        (1, options("one", 4)),
        (2, options("ddp", 2)),
        (2, options("fsdp", 2, "--parallel", "fsdp", "--save_every", "4")),
        (1, options("fsdp, then one", 4, "--resume_training", f"{tmp_path}/fsdp/checkpoints/checkpoint-4")),
        (2, options("bf16", 2, "--parallel", "fsdp", "--precision", "bf16", "--max_steps", "2")),
    )
    assert done.returncode == 0, done.stdout
    expected = weights.read_state_dict(tmp_path / "one" / "checkpoints" / "checkpoint-8.pt")
    assert expected.keys() == weights.read_state_dict(base).keys()
    for name in ("ddp", "fsdp", "fsdp, then one"):
        folder = tmp_path / name / "checkpoints"
        state = weights.read_state_dict(folder / ("checkpoint-8" if name == "fsdp" else "checkpoint-8.pt"))
        best = checkpoint_file.load(folder / "best.pt")
        for key, value in expected.items():
            torch.testing.assert_close(state[key], value, rtol=1e-4, atol=2e-5, msg=f"{name}: {key}")
            assert best["model"][key].shape == value.shape
    step = weights.read_state_dict(tmp_path / "bf16" / "checkpoints" / "checkpoint-2")
    assert step.keys() == expected.keys() and all(value.dtype == torch.float32 for value in step.values())


def test_small_parts_may_be_trained_beside_the_additions(pictures, base, tmp_path):
    train(pictures, base, tmp_path, "model.lora_also=bias,norm,stem", "max_steps=3")
    state = checkpoint_file.load(tmp_path / "checkpoints" / "checkpoint-3.pt")["model"]
    before = weights.read_state_dict(base)
    same = {name for name, tensor in before.items() if name in state and torch.equal(state[name], tensor)}
    assert same == {f"blocks.{i}.{layer}.weight" for i in range(4) for layer in ("attn.proj", "mlp.fc1")}
    wrapped = {f"blocks.{i}.{layer}.base_layer.weight" for i in range(4) for layer in ("attn.qkv", "mlp.fc2")}
    assert all(torch.equal(state[name], before[name.replace(".base_layer", "")]) for name in wrapped)
    assert weights.read_state_dict(tmp_path / "checkpoints" / "checkpoint-3.pt").keys() == before.keys()


def test_a_layer_that_is_not_there_is_named(tmp_path):
    with pytest.raises(UsageError, match="model.lora_also=cls: choose some of bias,norm,stem"):
        vit.Trainer(output_dir=tmp_path, overrides={"model.train": "lora", "model.lora_also": "cls"})
    with pytest.raises(UsageError, match="model.lora_layers=qkv,head: choose some of qkv,proj,fc1,fc2"):
        vit.Trainer(output_dir=tmp_path, overrides={"model.lora_layers": "qkv,head"})
