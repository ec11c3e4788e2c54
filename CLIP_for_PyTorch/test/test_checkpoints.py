"""Checkpoints of run_clip.py: written behind the training, whole, gone on from, and refused by another run."""

import json
import os
import shutil
import signal
import threading

import pytest
import torch
from safetensors.torch import load_file
from test_run_clip import losses, run, train_options

from clip_pretraining import resume
from clip_pretraining.evaluation import encoder
from clip_pretraining.training.trainer import ClipTrainer
from common import checkpoint_file
from common.checkpoint import digests
from common.errors import PREEMPTED, RunFailed
from common.run import preemption
from common.run.result_file import read as read_result


def test_a_resumed_run_is_the_uninterrupted_one(pairs_table, tiny_model, tmp_path):
    """Stopped in mid-epoch (3 steps each), with dropout, other workers and a checkpoint that was cut short."""
    options = train_options(pairs_table, "--max_steps", "8", "--save_every", "4")
    run(tmp_path / "whole", tiny_model, *options)
    shutil.copytree(tmp_path / "whole", tmp_path / "stopped")
    (tmp_path / "stopped/checkpoint-8/complete.json").unlink()
    (tmp_path / "stopped/checkpoint-8/optimizer.pt").write_bytes(b"PK")
    (tmp_path / "stopped/model.safetensors").unlink()
    with pytest.warns(UserWarning, match="checkpoint-8: .*complete.json"):
        run(tmp_path / "stopped", tiny_model, *options, "--num_workers", "1")
    whole, resumed = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "stopped"))
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)
    assert losses(tmp_path / "stopped")[-4:] == losses(tmp_path / "whole")[-4:]

    run(tmp_path / "stopped", tiny_model, *options)  # nothing is left to do: not a step more
    again = load_file(tmp_path / "stopped/model.safetensors")
    assert all(torch.equal(whole[key], again[key]) for key in whole)
    assert len(losses(tmp_path / "stopped")) == 8  # no step twice


def test_training_goes_on_while_a_checkpoint_is_written(pairs_table, tiny_model, tmp_path, monkeypatch):
    """It is what was saved, gets its name when it is whole, and a disk that fails ends the run by its name."""
    options = train_options(pairs_table, "--max_steps", "4", "--save_every", "2", "--ema_decay", "0.9")
    with monkeypatch.context() as patch:
        patch.setenv("BACKGROUND_WRITE", "0")
        run(tmp_path / "at once", tiny_model, *options)
    gate, found, output = threading.Event(), [], tmp_path / "behind"
    seal, training_step = digests.seal, ClipTrainer.training_step

    def held(*arguments):
        assert gate.wait(600)
        seal(*arguments)

    def step(self, *arguments, **more):
        if self.state.global_step == 3:
            found.append((output / "checkpoint-2").exists())
            gate.set()
        return training_step(self, *arguments, **more)

    def full(folder):
        raise OSError(28, "No space left on device", str(folder))

    monkeypatch.setattr(ClipTrainer, "training_step", step)
    monkeypatch.setattr(digests, "seal", held)
    run(output, tiny_model, *options)
    assert found == [False]
    for name in ("checkpoint-2", "checkpoint-4"):
        ours, theirs = output / name, tmp_path / "at once" / name
        assert {path.name for path in ours.iterdir()} == {path.name for path in theirs.iterdir()}
        for file in ("model.safetensors", "average.safetensors"):
            torch.testing.assert_close(load_file(ours / file), load_file(theirs / file), rtol=0, atol=0)
        mine, other = (checkpoint_file.load(folder / "optimizer.pt")["state"] for folder in (ours, theirs))
        torch.testing.assert_close(mine, other, rtol=0, atol=0)
    monkeypatch.setattr(digests, "seal", full)
    with pytest.raises(RunFailed, match="checkpoint-2: No space left on device"):
        run(tmp_path / "full", tiny_model, *options)
    assert read_result(tmp_path / "full/CLIP_for_PyTorch_bs8_1p_acc.log")["Status"] == "FAILED"


def test_a_bit_that_flips_in_any_file_of_a_checkpoint_is_noticed(pairs_table, tiny_model, tmp_path):
    """The one before it is gone on from; with one kept there is always a whole one."""
    options = train_options(pairs_table, "--max_steps", "3", "--save_every", "1", "--save_total_limit", "2")
    run(tmp_path, tiny_model, *options)
    newest, before = tmp_path / "checkpoint-3", tmp_path / "checkpoint-2"
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == [before.name, newest.name]
    assert resume.choose(tmp_path, None, False) == newest
    files = [path for path in newest.iterdir() if path.is_file()]
    assert {"optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"} <= {path.name for path in files}
    for path in files:
        whole = path.read_bytes()
        at = len(whole) // 3
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 16]) + whole[at + 1 :])
        with pytest.warns(UserWarning, match="checkpoint-3: "):
            assert resume.choose(tmp_path, "auto", False) == before, path
        with pytest.raises(SystemExit):
            resume.choose(tmp_path, str(newest), False)
        path.write_bytes(whole)
    assert resume.choose(tmp_path, None, False) == newest


def test_a_signal_ends_the_step_and_the_same_command_goes_on(pairs_table, tiny_model, tmp_path, monkeypatch):
    options = train_options(pairs_table, "--max_steps", "4", "--lr_scheduler_type", "constant")
    run(tmp_path / "whole", tiny_model, *options)

    def ask(self, *args, **kwargs):
        if self.state.global_step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return training_step(self, *args, **kwargs)

    training_step = ClipTrainer.training_step
    monkeypatch.setattr(ClipTrainer, "training_step", ask)
    with pytest.raises(SystemExit) as stopped:
        run(tmp_path / "part", tiny_model, *options)
    monkeypatch.undo()
    assert stopped.value.code == PREEMPTED and (tmp_path / "part/checkpoint-3").is_dir()
    assert read_result(tmp_path / "part/CLIP_for_PyTorch_bs8_1p_acc.log")["Status"] == "PREEMPTED"
    run(tmp_path / "part", tiny_model, *options)
    assert losses(tmp_path / "part") == losses(tmp_path / "whole")


@pytest.mark.parametrize("strategy", ["steps", "no"])
def test_a_signal_in_an_evaluation_saves_and_the_evaluation_is_made_up_for(
    pairs_table, tiny_model, tmp_path, monkeypatch, strategy
):
    """While training, and after its last step with nothing saved so far."""
    evaluation = ["--do_eval", "--validation_file", str(pairs_table), "--eval_strategy", strategy, "--eval_steps", "2"]
    options = train_options(pairs_table, "--max_steps", "4", *evaluation)
    whole = run(tmp_path / "whole", tiny_model, *options)

    def ask(batches):
        os.kill(os.getpid(), signal.SIGUSR1)
        return preemption.until_asked(batches)

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stopped:
        patch.setattr(encoder, "until_asked", ask)
        run(tmp_path / "part", tiny_model, *options)
    step = {"steps": 2, "no": 4}[strategy]
    assert stopped.value.code == PREEMPTED and (tmp_path / f"part/checkpoint-{step}").is_dir()
    part = run(tmp_path / "part", tiny_model, *options)
    assert part["EvalLoss"] == whole["EvalLoss"] and losses(tmp_path / "part") == losses(tmp_path / "whole")
    evaluated = [
        [(line["step"], line["eval_loss"]) for line in map(json.loads, path.open()) if line["kind"] == "eval"]
        for path in (tmp_path / "part/metrics.jsonl", tmp_path / "whole/metrics.jsonl")
    ]
    assert evaluated[0] == evaluated[1] and len(evaluated[0]) == {"steps": 3, "no": 1}[strategy]


def test_a_different_run_is_not_resumed(pairs_table, tiny_model, tmp_path, capsys):
    run(tmp_path, tiny_model, *train_options(pairs_table, "--max_steps", "2", "--save_every", "2"))
    with pytest.raises(SystemExit):
        run(tmp_path, tiny_model, *train_options(pairs_table, "--max_steps", "4", "--seed", "7"))
    assert "seed was 42, is now 7" in capsys.readouterr().err
    run(tmp_path, tiny_model, *train_options(pairs_table, "--max_steps", "1", "--overwrite_output_dir"))
    kept = [path.name for path in tmp_path.glob("earlier/*/*")]
    for name in ("checkpoint-2", "model.safetensors", "tokenizer.json", "processor_config.json"):
        assert name in kept  # nothing was lost


def test_what_may_change_in_a_resumed_run_takes_effect(pairs_table, tiny_model, tmp_path):
    """A finished run of 4 steps made longer, with another rate: from its first step on it follows the new schedule."""
    output = tmp_path / "out"
    run(output, tiny_model, *train_options(pairs_table, "--max_steps", "4", "--save_every", "2"))
    more = ["--max_steps", "8", "--save_every", "4", "--learning_rate", "4e-3", "--weight_decay", "0.3"]
    run(output, tiny_model, *train_options(pairs_table, *more))
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    rates = {line["step"]: line["lr"] for line in lines if line["kind"] == "train"}
    assert [rates[step] for step in range(5, 9)] == pytest.approx([4e-3 * (1 - step / 8) for step in range(4, 8)])
    groups = torch.load(output / "checkpoint-8/optimizer.pt", weights_only=True)["param_groups"]
    assert groups[0]["weight_decay"] == 0.3 and groups[0]["initial_lr"] == 4e-3


@pytest.mark.parametrize(
    "options, fact",
    [
        (["--train_file", "OTHER"], "data.captions was"),
        (["--freeze_vision_model", "True"], "frozen was [], is now ['vision_model']"),
        (["--optim", "sgd"], "optim was 'adamw_torch', is now 'sgd'"),
        (["--precision", "bf16"], "precision was 'fp32', is now 'bf16'"),
        (["--freeze_vision_model", "True", "--accept_changes", "all"], "begin a new run: its weights or its optimizer"),
        (["--lora_rank", "2", "--accept_changes", "lora"], "lora was [], is now [2, 1.0]"),
    ],
)
def test_what_changes_the_mathematics_is_refused(options, fact, pairs_table, tiny_model, tmp_path, capsys):
    run(tmp_path / "out", tiny_model, *train_options(pairs_table, "--max_steps", "1", "--save_every", "1"))
    other = pairs_table.with_name("other.csv")
    rows = pairs_table.read_text().splitlines()
    other.write_text("\n".join([*rows[:-1], rows[-1].replace("box", "square")]))
    options = [str(other) if word == "OTHER" else word for word in options]
    with pytest.raises(SystemExit):
        run(tmp_path / "out", tiny_model, *train_options(pairs_table, "--max_steps", "2", *options))
    assert fact in capsys.readouterr().err
