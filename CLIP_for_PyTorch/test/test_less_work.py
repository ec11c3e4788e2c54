"""Averaged weights, LoRA and patch dropout: what they compute, that a resume is exact, and what users are given."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_run_clip import losses, run, train_options
from transformers import VisionTextDualEncoderModel

from clip_pretraining.model import construction, layers, patch_dropout
from clip_pretraining.training.trainer import AVERAGE_FILE

CAPTIONS = ["a red box", "a green box on white ground"] * 3


def weights(folder: Path, name: str = "model.safetensors") -> dict[str, torch.Tensor]:
    return load_file(folder / name)


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize(
    "family, options",
    [
        ("tiny_model", ["--ema_decay", "0.9", "--keep_patches", "0.5", "--random_crop", "0.6"]),
        ("tiny_clip", ["--lora_rank", "2", "--lora_alpha", "8", "--ema_decay", "0.5"]),
    ],
)
def test_a_resume_is_exact_with_them(family, options, pairs_table, tmp_path, request):
    """Stopped in mid-epoch; two chunks a step, whose second pass keeps the patches of the first."""
    model = request.getfixturevalue(family)
    chunks = ["--per_device_train_batch_size", "4", "--gradient_accumulation_steps", "2"]
    options = train_options(pairs_table, *chunks, "--max_steps", "4", "--save_every", "2", *options)
    run(tmp_path / "whole", model, *options)
    shutil.copytree(tmp_path / "whole", tmp_path / "part")
    shutil.rmtree(tmp_path / "part/checkpoint-4")
    run(tmp_path / "part", model, *options)
    assert losses(tmp_path / "part") == losses(tmp_path / "whole")
    for name in ("model.safetensors", f"checkpoint-4/{AVERAGE_FILE}", "checkpoint-4/model.safetensors"):
        assert same(weights(tmp_path / "whole", name), weights(tmp_path / "part", name)), name


def test_the_average_is_of_all_updates_and_is_what_is_evaluated(pairs_table, tiny_model, tmp_path, capsys):
    steps, decay = 3, 0.6
    evaluation = ["--do_eval", "--validation_file", str(pairs_table), "--per_device_eval_batch_size", "8"]
    options = ["--max_steps", str(steps), "--save_every", "1", "--ema_decay", str(decay), *evaluation]
    result = run(tmp_path, tiny_model, *train_options(pairs_table, *options))
    want = weights(tiny_model)
    for step in range(1, steps + 1):
        trained = weights(tmp_path / f"checkpoint-{step}")
        keep = min(decay, (1 + step) / (10 + step))
        want = {key: keep * want[key] + (1 - keep) * trained[key] for key in want}
    for key, value in weights(tmp_path).items():
        torch.testing.assert_close(value, want[key], atol=1e-6, rtol=1e-5)
    alone = run(tmp_path / "alone", tmp_path, *evaluation)
    assert alone["EvalLoss"] == pytest.approx(result["EvalLoss"], abs=1e-6)
    assert "note: " not in capsys.readouterr().out
    run(tmp_path / "of a checkpoint", tmp_path / "checkpoint-3", *evaluation)
    assert "checkpoint-3 is a training's checkpoint: its last weights are taken, not their average" in (
        capsys.readouterr().out
    )


def test_lora_trains_its_additions_alone_and_users_get_plain_layers(pairs_table, tiny_model, tmp_path, capsys):
    evaluation = ["--do_eval", "--validation_file", str(pairs_table), "--per_device_eval_batch_size", "8"]
    options = ["--max_steps", "2", "--save_every", "2", "--lora_rank", "2", "--freeze_vision_model", "True"]
    result = run(tmp_path, tiny_model, *train_options(pairs_table, *options, *evaluation))
    start, trained, parts = weights(tiny_model), weights(tmp_path), weights(tmp_path / "checkpoint-2")
    assert start.keys() == trained.keys()
    changed = {key for key in start if not torch.equal(start[key], trained[key])}
    inside = {key for key in changed if key.startswith("text_model.")}
    assert changed - inside == {"visual_projection.weight", "text_projection.weight", "logit_scale"}
    assert len(inside) == 2 * 6 and all(".encoder.layer." in key and key.endswith("weight") for key in inside)
    for key in start.keys() - (changed - inside):  # a checkpoint has the layers as they were, and the additions
        layer, _, kind = key.rpartition(".")
        assert torch.equal(parts.get(f"{layer}.base_layer.{kind}", parts.get(key)), start[key]), key
    VisionTextDualEncoderModel.from_pretrained(tmp_path)
    alone = run(tmp_path / "alone", tmp_path, *evaluation)
    assert alone["EvalLoss"] == pytest.approx(result["EvalLoss"], abs=1e-6)
    with pytest.raises(SystemExit):
        run(tmp_path / "alone", tmp_path / "checkpoint-2", *evaluation)
    assert "give the folder of the run that wrote it" in capsys.readouterr().err


def test_a_part_of_the_patches_is_seen_in_training_alone():
    """Patches outside of those that are drawn have no gradient; the positions go with them."""
    torch.manual_seed(0)
    model, _, _ = construction.from_scratch("tiny", "clip", CAPTIONS)
    layers.install(model)
    patch_dropout.keep_patches(model, 0.25)
    pixels = torch.randn(1, 3, 32, 32, requires_grad=True)
    model.vision_model(pixels).pooler_output[:, 0].sum().backward()
    seen = pixels.grad[0].abs().sum(0).unfold(0, 8, 8).unfold(1, 8, 8).sum((2, 3))  # [4, 4]
    assert int((seen > 0).sum()) == 4
    positions = model.vision_model.embeddings.position_embedding.weight.grad  # [17, C]
    assert torch.equal(positions.abs().sum(1) > 0, torch.cat([torch.tensor([True]), (seen > 0).flatten()]))
    model.eval()
    assert torch.equal(model.vision_model(pixels).pooler_output, model.vision_model(pixels).pooler_output)
    pixels.grad = None
    model.vision_model(pixels).pooler_output[:, 0].sum().backward()
    assert int((pixels.grad[0].abs().sum(0).unfold(0, 8, 8).unfold(1, 8, 8).sum((2, 3)) > 0).sum()) == 16


@pytest.mark.parametrize(
    "options, words",
    [
        (["--keep_patches", "0"], "--keep_patches 0.0: must be above 0"),
        (["--replay", ""], "--replay is empty"),
        (["--keep_patches", "0.5", "--freeze_vision_model", "True"], "it is frozen"),
        (["--ema_decay", "1"], "--ema_decay 1.0: must be"),
        (["--lora_alpha", "8"], "give that too"),
        (["--random_crop", "0.9", "--crop_cache", "crops"], "leave one of them out"),
        (["--lora_rank", "2", "--freeze_vision_model", "True", "--freeze_text_model", "True"], "both are frozen"),
        (["--fsdp", "shard_grad_op"], "there is --fsdp full_shard"),
        (["--fsdp", "full_shard"], "start with torchrun"),
        (["--fsdp", "full_shard", "--torch_compile", "True"], "leave one of them out"),
        (["--fsdp", "full_shard", "--optim", "sgd"], "only AdamW"),
    ],
)
def test_what_does_not_go_together_is_said_in_a_sentence(options, words, pairs_table, tiny_model, tmp_path, capsys):
    with pytest.raises(SystemExit) as refused:
        run(tmp_path, tiny_model, *train_options(pairs_table, "--max_steps", "1", *options))
    error = capsys.readouterr().err.strip()
    assert refused.value.code == 2 and words in error and "Traceback" not in error
