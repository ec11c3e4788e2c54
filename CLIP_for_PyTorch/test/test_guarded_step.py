"""fp16 steps that overflow: every optimizer on offer leaves weights, moments and schedule as they are, and says so."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import run_clip
from clip_pretraining.options.checks import OPTIMIZERS
from clip_pretraining.training.trainer import ClipTrainer
from common.run.result_file import read as read_result
from common.update import MAX_SKIPPED


def command(output: Path, model: Path, table: Path, *more: str) -> list[str]:
    quick = ["--log_every", "1", "--save_every", "0", "--device", "cpu", "--per_device_train_batch_size", "8"]
    paths = ["--output_dir", str(output), "--model_name_or_path", str(model), "--train_file", str(table), "--do_train"]
    return [*paths, *quick, "--fp16", "--learning_rate", "1e-3", *more]


def lines(output: Path) -> list[dict]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines() if '"train"' in line]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_planted_overflow_changes_nothing(optimizer, pairs_table, tiny_model, tmp_path, monkeypatch):
    """Step 1 of three is spoilt in the gradient of one parameter, for which no kernel is asked to look."""
    seen = []

    def spoil(self, *args, **kwargs):
        loss = training_step(self, *args, **kwargs)
        if self.state.global_step == 0:
            self.model.text_projection.weight.grad[0, 0] = float("inf")
        state = {name: value.clone() for name, value in self.model.state_dict().items()}
        seen.append((state, len(self.optimizer.state), self.optimizer.param_groups[0]["lr"]))
        return loss

    training_step = ClipTrainer.training_step
    monkeypatch.setattr(ClipTrainer, "training_step", spoil)
    options = ["--optim", optimizer, "--max_steps", "3", "--loss_scale", "128"]
    run_clip.main(command(tmp_path, tiny_model, pairs_table, *options))
    (first, _, rate_1), (second, moments, rate_2), (third, _, rate_3) = seen
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert rate_1 == rate_2 > rate_3 and not any(torch.equal(second[n], third[n]) for n in ("logit_scale",))
    if optimizer != "adagrad":  # whose sums are there from the beginning
        assert moments == 0
    assert [line["skipped"] for line in lines(tmp_path)] == [1.0, 0.0, 0.0]
    assert all(line["grad_norm"] == line["grad_norm"] for line in lines(tmp_path))  # no nan, in the first line either


def test_a_run_without_a_single_update_ends_with_advice(pairs_table, tiny_model, tmp_path):
    """Projections so small that their gradients, and with them all others, overflow fp16 at a constant scale."""
    small = tmp_path / "model"
    shutil.copytree(tiny_model, small)
    weights = load_file(small / "model.safetensors")
    for name in ("visual_projection.weight", "text_projection.weight"):
        weights[name] *= 1e-5
    save_file(weights, small / "model.safetensors", metadata={"format": "pt"})
    options = ["--loss_scale", "65536", "--max_steps", str(MAX_SKIPPED + 5)]
    with pytest.raises(SystemExit, match="use bf16 or fp32"):
        run_clip.main(command(tmp_path / "out", small, pairs_table, *options))
    stored = read_result(tmp_path / "out/CLIP_for_PyTorch_bs8_1p_acc.log")
    assert stored["Status"] == "FAILED" and "50 steps in a row" in stored["Error"]


def test_a_dynamic_scale_is_kept_in_the_checkpoint(pairs_table, tiny_model, tmp_path):
    options = ["--loss_scale", "12800000", "--lr_scheduler_type", "constant", "--save_every", "2"]
    run_clip.main(command(tmp_path / "whole", tiny_model, pairs_table, *options, "--max_steps", "4"))
    shutil.copytree(tmp_path / "whole", tmp_path / "part")
    shutil.rmtree(tmp_path / "part/checkpoint-4")
    run_clip.main(command(tmp_path / "part", tiny_model, pairs_table, *options, "--max_steps", "4", "--resume", "auto"))
    scales = [line["loss_scale"] for line in lines(tmp_path / "whole")]
    assert [line["loss_scale"] for line in lines(tmp_path / "part")][-2:] == scales[-2:] and scales[0] > scales[-1]
