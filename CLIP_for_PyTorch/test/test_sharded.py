"""--fsdp on forked ranks: the numbers of DDP, and checkpoints that either goes on from."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import run_clip
from ci.gates.forked_ranks import run
from clip_pretraining.training.trainer import AVERAGE_FILE
from common import checkpoint_file

LAST = 4


@pytest.fixture(scope="module")
def runs(tmp_path_factory, pairs_table, tiny_model, tiny_clip) -> Path:
    """Both families under DDP and sharded, on two ranks; one more pair to evaluate on one rank than on the other."""
    root = tmp_path_factory.mktemp("sharded")
    rows = pairs_table.read_text().splitlines()
    validation = pairs_table.with_name("odd.csv")
    validation.write_text("\n".join(rows[:14]))

    def options(output: str, model: Path, *more: str) -> list[str]:
        data = [
            "--train_file",
            str(pairs_table),
            "--validation_file",
            str(validation),
            "--output_dir",
            str(root / output),
        ]
        sizes = [
            "--batch_size",
            "4",
            "--per_device_eval_batch_size",
            "2",
            "--max_steps",
            str(LAST),
            "--save_every",
            "2",
        ]
        train = [
            "--do_train",
            "--do_eval",
            "--learning_rate",
            "1e-3",
            "--retrieval_picture",
            "False",
            "--log_every",
            "1",
        ]
        steps = ["--eval_strategy", "steps", "--eval_steps", "2", "--device", "cpu", "--model_name_or_path", str(model)]
        return [*train, *data, *sizes, *steps, *more]

    dual = (tiny_model, "--ema_decay", "0.9")
    clip = (tiny_clip, "--loss", "siglip", "--lora_rank", "2", "--keep_patches", "0.5", "--max_grad_norm", "0.5")
    clip += ("--batch_size", "2", "--gradient_accumulation_steps", "2", "--gradient_checkpointing", "True")
    commands = {}
    for name, (model, *more) in (("dual", dual), ("clip", clip)):
        commands[f"{name}, ddp"] = options(f"{name}, ddp", model, *more)
        commands[f"{name}, fsdp"] = options(f"{name}, fsdp", model, *more, "--fsdp", "full_shard")
    for source, target, *more in (("fsdp", "ddp"), ("ddp", "fsdp", "--fsdp", "full_shard")):
        name = f"dual, {source} then {target}"
        commands[name] = options(name, *dual, *more, "--resume", str(root / f"dual, {source}/checkpoint-2"))
    done = run(Path(run_clip.__file__), ["transformers", "peft"], *((2, command) for command in commands.values()))
    assert done.returncode == 0, done.stdout
    return root


def lines(folder: Path, kind: str) -> dict[int, dict]:
    found = [json.loads(text) for text in (folder / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line for line in found if line["kind"] == kind}


@pytest.mark.parametrize(
    "ours, theirs, first",
    [
        ("dual, fsdp", "dual, ddp", 1),
        ("clip, fsdp", "clip, ddp", 1),
        ("dual, fsdp then ddp", "dual, ddp", 3),
        ("dual, ddp then fsdp", "dual, ddp", 3),
    ],
)
def test_losses_evaluations_and_weights_are_those_of_ddp(runs, ours, theirs, first):
    mine, other = lines(runs / ours, "train"), lines(runs / theirs, "train")
    assert list(mine) == list(range(first, LAST + 1)) and list(other) == list(range(1, LAST + 1))
    for step, line in mine.items():
        for key in ("loss", "grad_norm", "logit_scale", "lr"):
            assert line[key] == pytest.approx(other[step][key], rel=1e-5), (step, key)
    assert lines(runs / ours, "eval")[LAST]["eval_loss"] == pytest.approx(
        lines(runs / theirs, "eval")[LAST]["eval_loss"], rel=1e-5
    )
    files = ["model.safetensors", "checkpoint-4/model.safetensors"]
    files += [f"checkpoint-4/{AVERAGE_FILE}"] if ours.startswith("dual") else []
    for name in files:
        mine, other = load_file(runs / ours / name), load_file(runs / theirs / name)
        assert mine.keys() == other.keys()
        for key, value in other.items():
            torch.testing.assert_close(mine[key], value, atol=2e-5, rtol=1e-4)


def test_an_optimizer_s_file_is_that_of_a_model_that_is_not_sharded(runs):
    mine, other = (checkpoint_file.load(runs / f"clip, {kind}/checkpoint-2/optimizer.pt") for kind in ("fsdp", "ddp"))
    assert mine["state"].keys() == other["state"].keys() and mine["param_groups"] == other["param_groups"]
    for index, entry in other["state"].items():
        for name, value in entry.items():
            assert mine["state"][index][name].shape == value.shape, (index, name)
