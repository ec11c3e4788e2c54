"""train.py as users start it: fairseq's log to the digit, resume, ranks, refusals."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from small_runs import assert_same, last, lines, words

PROJECT = Path(__file__).resolve().parents[1]

TINY = (PROJECT / "test" / "tiny.yaml").read_text()


def run(train_main, tiny, corpus, output, *arguments):
    train_main(words(tiny, "tiny", corpus, output, *arguments))


def fairseq_lines(text):
    return re.findall(r"\[(\w+)\]\[INFO\] - (\{.*\})", text)


@pytest.fixture(scope="session")
def initial_weights(golden, tmp_path_factory):
    data = np.load(golden / "model_base.npz")
    state = {key[5:]: torch.from_numpy(data[key]) for key in data.files if key.startswith("init/")}
    path = tmp_path_factory.mktemp("init") / "init.pt"
    torch.save({"model": state}, path)
    return path


def test_twelve_updates_as_fairseq_logs_them(
    train_main, tiny, corpus, tmp_path, capsys, golden, initial_weights, check_profile
):
    run(train_main, tiny, corpus, tmp_path / "out", f"checkpoint.finetune_from_model={initial_weights}", "--profile")
    ours = fairseq_lines(capsys.readouterr().out)
    expected = fairseq_lines((golden / "e2e_train_log.txt").read_text())
    timing = ("wps", "ups", "wall")
    assert [tag for tag, _ in ours] == [tag for tag, _ in expected]
    for (tag, line), (_, golden_line) in zip(ours, expected, strict=True):
        line, golden_line = json.loads(line), json.loads(golden_line)
        assert list(line) == list(golden_line), tag
        for key, value in golden_line.items():
            if key.endswith(timing):
                continue
            assert isinstance(line[key], type(value))
            digits = len(str(value).partition(".")[2])
            assert float(line[key]) == pytest.approx(float(value), abs=1.01 * 10**-digits, rel=1e-6), (tag, key)
    results = (tmp_path / "out" / "Data2vec_for_PyTorch_bs256_1p_acc.log").read_text()
    for key in ("Status = OK", "SequencesPerSecond", "UpdatesPerSecond", "TokensPerSecond", "ValidBestLoss"):
        assert key in results
    assert "StepTimeMs" in results and "\nTrainingTime" not in results, "bs256 is tokens"
    check_profile(tmp_path / "out", "10 to 12", "aten::_fused_adamw_")


LONGER = ["model.transformer.dropout=0.1", "model.transformer.attention_dropout=0.1"]
LONGER += ["optimization.max_update=26", "dataset.disable_validation=true"]


@pytest.fixture(scope="module")
def uninterrupted(train_main, tmp_path_factory, golden):
    """The checkpoint of a run of 26 updates."""
    folder = tmp_path_factory.mktemp("whole")
    (folder / "tiny.yaml").write_text(TINY)
    run(train_main, folder, golden / "bin", folder, *LONGER)
    return last(folder)


@pytest.mark.parametrize("stop", [5, 23])
def test_resume_equals_continuation(train_main, tiny, corpus, tmp_path, uninterrupted, stop):
    """Stopped in the first epoch (of 19 batches) or in the second, with dropout: bit for bit."""
    run(train_main, tiny, corpus, tmp_path / "parts", *LONGER, "--max_steps", str(stop))
    assert last(tmp_path / "parts")["optimizer_history"][-1]["num_updates"] == stop
    run(train_main, tiny, corpus, tmp_path / "parts", *LONGER, "--num_workers", "1")
    whole, parts = uninterrupted, last(tmp_path / "parts")
    for key in ("model", "last_optimizer_state", "optimizer_history"):
        assert_same(whole[key], parts[key], key)
    assert whole["extra_state"]["train_iterator"] == parts["extra_state"]["train_iterator"]
    assert lines(tmp_path / "parts", "train")[-1]["step"] == 26
    own, expected = (checkpoint["extra_state"]["meters"]["epoch"] for checkpoint in (parts, whole))
    assert own["updates"] == 26 - 19
    for key in ("loss", "sample_size", "sentences", "gnorm", "clipped", "ema_decay"):
        assert own[key] == pytest.approx(expected[key], rel=1e-12), key


def test_train_line_goes_on_after_a_resume(train_main, tiny, corpus, tmp_path, capsys):
    """The epoch's averages, printed at its end, count the updates before the stop."""
    settings = ["dataset.disable_validation=true", "optimization.max_update=19", "--log_every", "5"]
    lines = {}
    for name, stops in (("whole", (19,)), ("parts", (7, 19))):
        for stop in stops:
            run(train_main, tiny, corpus, tmp_path / name, *settings, "--max_steps", str(stop))
        found = fairseq_lines(capsys.readouterr().out)
        lines[name] = [json.loads(line) for tag, line in found if tag in ("train", "train_inner")]
        lines[name] = {(line.get("num_updates"), line.get("train_num_updates")): line for line in lines[name]}
    for key in ("10", None), (None, "19"):
        whole, parts = lines["whole"][key], lines["parts"][key]
        for name, value in whole.items():
            if not name.endswith(("wps", "ups", "wall")):
                assert parts[name] == value, name


@pytest.mark.parametrize("keeps", [True, False])
def test_a_signal_at_an_epochs_end(train_main, tiny, corpus, tmp_path, capsys, monkeypatch, keeps):
    """The epoch, of 19 batches, has its line, and nothing is said of a checkpoint that no_save forbids."""
    from data2vec.training import loop

    def update_and_ask(run, batches):
        result = one_update(run, batches)
        if run.state.num_updates == 19:
            os.kill(os.getpid(), signal.SIGTERM)
        return result

    one_update = loop.train_update
    monkeypatch.setattr(loop, "train_update", update_and_ask)
    with pytest.raises(SystemExit) as stop:
        settings = ["optimization.max_update=30", "dataset.disable_validation=true"]
        run(train_main, tiny, corpus, tmp_path, *settings, f"checkpoint.no_save={not keeps}")
    assert stop.value.code == 75
    told = capsys.readouterr()
    trained = [json.loads(line) for tag, line in fairseq_lines(told.out) if tag == "train"]
    assert [(line["epoch"], line["train_num_updates"]) for line in trained] == [(1, "19")]
    assert (tmp_path / "checkpoints/checkpoint_last.pt").exists() == keeps
    assert ("its checkpoint is written" in told.err + told.out) == keeps
    assert ("without a checkpoint, as it was told" in told.err + told.out) != keeps


@pytest.mark.parametrize("device_waits", [True, False])
def test_nan_never_reaches_a_checkpoint(train_main, tiny, corpus, tmp_path, monkeypatch, device_waits):
    """A CPU does not apply the update; on accelerators the run goes on until somebody looks, and nothing is saved."""
    import train
    from common.update import GuardedStep

    whole = train.forward_of

    def forward_of(*arguments):
        forward, calls = whole(*arguments), []

        def broken(model, batch):
            calls.append(1)
            out = forward(model, batch)
            return {**out, "loss_sum": out["loss_sum"] * (float("nan") if len(calls) == 3 else 1.0)}

        return broken

    monkeypatch.setattr(train, "forward_of", forward_of)
    states = []
    make_state = train.make_state
    monkeypatch.setattr(train, "make_state", lambda *a: states.append(make_state(*a)) or states[-1])
    if not device_waits:
        monkeypatch.setattr(GuardedStep, "_may_apply", lambda *a: True)
    command = [tmp_path / "out", "--log_every", "100", "--save_every", "5"]
    with pytest.raises(SystemExit, match=r"step 3 on rank 0 \(samples \d+, "):
        run(train_main, tiny, corpus, *command)
    assert not list((tmp_path / "out").glob("checkpoints/*.pt"))
    finite = all(torch.isfinite(p).all() for p in states[0].model.parameters())
    assert finite == device_waits and states[0].num_updates == (2 if device_waits else 5)
    assert "Status = FAILED" in (tmp_path / "out" / "Data2vec_for_PyTorch_bs256_1p_acc.log").read_text()
    if device_waits:
        monkeypatch.setattr(train, "forward_of", whole)
        run(train_main, tiny, corpus, *command, "--replay", str(tmp_path / "out/replay.json"))
        replayed = (tmp_path / "out" / "Data2vec_for_PyTorch_replay_bs256_1p_acc.log").read_text()
        assert "Replay = finite, the loss is " in replayed
        with pytest.raises(SystemExit, match="other samples"):
            run(train_main, tiny, corpus, *command, "--seed", "5", "--replay", str(tmp_path / "out/replay.json"))


def test_fp16_that_overflows_for_ever_ends(train_main, tiny, corpus, tmp_path, capsys):
    """Also where the scripts' common.threshold_loss_scale keeps fairseq's own abort out of reach."""
    settings = ["--precision", "fp16", "common.fp16_init_scale=2e38", "common.threshold_loss_scale=1e38"]
    settings += ["dataset.disable_validation=true"]
    with pytest.raises(SystemExit, match="50 steps in a row without an update.*use bf16 or fp32"):
        run(train_main, tiny, corpus, tmp_path / "out", *settings)
    assert capsys.readouterr().out.count("loss scale now 1e+38") == 49
    assert "Status = FAILED" in (tmp_path / "out" / "Data2vec_for_PyTorch_bs256_1p_acc.log").read_text()


def test_fairseq_checkpoint_resumes(train_main, tiny, corpus, tmp_path, golden, capsys):
    checkpoint = golden / "checkpoint_tiny.pt"
    run(
        train_main,
        tiny,
        corpus,
        tmp_path,
        "--resume",
        str(checkpoint),
        "optimization.max_update=20",
        "--max_steps",
        "7",
    )
    assert "update 6" in capsys.readouterr().out
    state = last(tmp_path)
    assert state["optimizer_history"][-1]["num_updates"] == 7
    reference = torch.load(checkpoint, weights_only=True)
    for key in ("model", "last_optimizer_state", "extra_state"):
        assert state[key].keys() >= reference[key].keys()
    assert list(state["model"]) == list(reference["model"])
    assert state["last_optimizer_state"]["state"][0]["step"] == 7
    assert (
        state["last_optimizer_state"]["param_groups"][0].keys()
        == reference["last_optimizer_state"]["param_groups"][0].keys()
    )


def test_reset_optimizer_begins_at_update_0_with_the_weights(
    train_main, tiny, corpus, tmp_path, golden, capsys, monkeypatch
):
    """As in fairseq, where updates are counted with the optimizer. The file is found from where the user stands."""
    monkeypatch.chdir(golden)
    options = ["--resume", "checkpoint_tiny.pt", *(f"checkpoint.reset_{x}=true" for x in ("optimizer", "lr_scheduler"))]
    run(train_main, tiny, corpus, tmp_path, *options, "--max_steps", "1")
    assert "epoch 1, update 0; changed since" in capsys.readouterr().out
    state, reference = last(tmp_path), torch.load(golden / "checkpoint_tiny.pt", weights_only=True)
    assert state["optimizer_history"][-1]["num_updates"] == state["last_optimizer_state"]["state"][0]["step"] == 1
    for key, value in reference["model"].items():
        if key != "encoder._ema":  # the first update has a learning rate of 0
            assert torch.equal(state["model"][key], value), key


def test_a_run_that_ends_with_its_warm_up(train_main, tiny, corpus, tmp_path, capsys):
    settings = ["lr_scheduler.warmup_updates=3", "optimization.max_update=3", "dataset.disable_validation=true"]
    run(train_main, tiny, corpus, tmp_path, *settings, "--log_every", "1")
    lines = [json.loads(line) for tag, line in fairseq_lines(capsys.readouterr().out) if tag == "train_inner"]
    rates = [float(line["lr"]) for line in lines]
    assert rates == pytest.approx([0.002 / 3, 0.004 / 3, 0.002], rel=1e-5)
    assert last(tmp_path)["optimizer_history"][-1]["num_updates"] == 3


def test_an_earlier_run_is_kept_aside(train_main, tiny, corpus, tmp_path, golden):
    """Wherever its checkpoints are, and when a run begins from a checkpoint of another folder."""
    settings = ["checkpoint.save_dir=weights", "dataset.disable_validation=true"]
    run(train_main, tiny, corpus, tmp_path, *settings, "--max_steps", "1")
    first = torch.load(tmp_path / "weights" / "checkpoint_last.pt", weights_only=True)
    elsewhere = ["--resume", str(golden / "checkpoint_tiny.pt")]
    run(train_main, tiny, corpus, tmp_path, *settings, *elsewhere, "--max_steps", "7")
    (kept,) = tmp_path.glob("weights/earlier/*/checkpoint_last.pt")
    assert_same(first, torch.load(kept, weights_only=True))
    assert len(list(tmp_path.glob("earlier/*/metrics.jsonl"))) == 1
    steps = [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert set(steps) == {7}
    run(train_main, tiny, corpus, tmp_path, *settings, "--max_steps", "8")  # goes on, and moves nothing
    assert len(list(tmp_path.glob("**/earlier/*/checkpoint_last.pt"))) == 1


def test_flat_fp16_optimizer_state_loads(golden, model_info, tmp_path):
    """fairseq keeps one flat fp32 buffer for all parameters of an fp16 run."""
    from common.distributed import World
    from data2vec import build_model
    from data2vec.config import load_config
    from data2vec.training.checkpoint import load_training_state
    from data2vec.training.update import make_state

    (tmp_path / "tiny.yaml").write_text(TINY)
    config, _ = load_config(tmp_path, "tiny", ["task.data=x"])
    checkpoint = torch.load(golden / "checkpoint_tiny.pt", weights_only=True)
    entries = checkpoint["last_optimizer_state"]["state"]
    flat = {k: torch.cat([entries[i][k].flatten() for i in entries]) for k in ("exp_avg", "exp_avg_sq")}
    checkpoint["last_optimizer_state"] = {"state": {0: {"step": 6, **flat}}, "param_groups": [], "loss_scale": 64.0}
    torch.save(checkpoint, tmp_path / "flat.pt")
    model = build_model(model_info["base"]["cfg_model"], 169)
    state = make_state(model, config, "fp16", World())
    load_training_state(state, checkpoint, tmp_path / "flat.pt", config)
    assert state.scaler.scale == 64.0
    for i, parameter in enumerate(model.parameters()):
        assert torch.equal(state.optimizer.state[parameter]["exp_avg_sq"], entries[i]["exp_avg_sq"])


def test_interval_checkpoints(train_main, tiny, corpus, tmp_path):
    run(train_main, tiny, corpus, tmp_path, "--save_every", "4", "checkpoint.keep_interval_updates=2")
    names = sorted(p.name for p in (tmp_path / "checkpoints").iterdir())
    assert names == ["checkpoint_1_12.pt", "checkpoint_1_8.pt", "checkpoint_best.pt", "checkpoint_last.pt"]


def test_two_ranks_equal_update_freq_two_and_either_goes_on_as_the_other(train_main, tiny, corpus, tmp_path, capsys):
    """The same 20 batches: two ranks, or one rank with two micro-batches an update (the last of 19 alone)."""
    common = ["--config-dir", str(tiny), "--config-name", "tiny", f"task.data={corpus}", "--device", "cpu"]
    common += ["model.ema_steps=per_update", "optimization.max_update=12"]
    outputs = {}
    for name, setting in (
        ("ranks", "distributed_training.distributed_world_size=2"),
        ("accumulated", "optimization.update_freq=[2]"),
    ):
        command = [sys.executable, "train.py", *common, setting, "--output_dir", str(tmp_path / name)]
        command += ["checkpoint.save_interval_updates=6"]
        done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        outputs[name] = last(tmp_path / name)
    resume = ["--resume", str(tmp_path / "ranks" / "checkpoints" / "checkpoint_1_6.pt")]
    train_main([*common, *resume, "--output_dir", str(tmp_path / "one of two")])
    assert "optimization.update_freq is 2 on 1 ranks: 2 batches an update, as before" in capsys.readouterr().out
    outputs["one of two"] = last(tmp_path / "one of two")
    assert outputs["one of two"]["optimizer_history"] == outputs["ranks"]["optimizer_history"]
    for other in ("accumulated", "one of two"):
        for key, value in outputs["ranks"]["model"].items():
            if key != "encoder._ema":
                torch.testing.assert_close(value, outputs[other]["model"][key], rtol=1e-4, atol=1e-6)
        for key, value in outputs["ranks"]["model"]["encoder._ema"].items():
            torch.testing.assert_close(value, outputs[other]["model"]["encoder._ema"][key], rtol=1e-4, atol=1e-6)
    for options in (["model.ema_steps=per_micro_batch"], ["optimization.update_freq=[3]"]):
        with pytest.raises(SystemExit):
            train_main(
                [*common, *resume, *options, "--accept_changes", "all", "--output_dir", str(tmp_path / "refused")]
            )
        assert "its updates were of 2 ranks x update_freq 1, these would be 1 x" in capsys.readouterr().err


def test_a_rank_without_a_batch_is_no_collapse(tiny, corpus, tmp_path):
    """Two batches for three ranks, over three epochs: a rank without one has no spread, which is not a spread of 0."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=3", "train.py"]
    command += ["--config-dir", str(tiny), "--config-name", "tiny", f"task.data={corpus}", "--device", "cpu"]
    command += [
        "dataset.max_tokens=4096",
        "optimization.max_epoch=3",
        "--log_every",
        "1",
        "--output_dir",
        str(tmp_path),
    ]
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    steps = lines(tmp_path, "train")
    assert len(steps) == 3 and all(step["target_std"] > 0.1 and step["pred_std"] > 1e-3 for step in steps)


@pytest.mark.parametrize(
    "options", [("--precision", "bf16"), ("--fp16_opt_level", "O2", "--loss_scale", "32", "--use_combine_grad")]
)
def test_sixteen_bits(train_main, tiny, corpus, tmp_path, options, capsys):
    run(train_main, tiny, corpus, tmp_path, *options, "--max_steps", "3", "--log_every", "1")
    state = last(tmp_path)
    assert state["optimizer_history"][-1]["num_updates"] == 3
    assert ('"loss_scale": "32"' in capsys.readouterr().out) == ("O2" in options)
    assert all(torch.isfinite(v).all() for k, v in state["model"].items() if k != "encoder._ema")


def test_collapse_stops_a_run(train_main, tiny, corpus, tmp_path, initial_weights):
    """A head that says the same for every token, once the warm-up (of 4 updates) is over; nothing is saved."""
    state = torch.load(initial_weights, weights_only=True)
    for kind in ("weight", "bias"):
        state["model"][f"encoder.regression_head.2.{kind}"].zero_()
    torch.save(state, tmp_path / "constant.pt")
    settings = [f"checkpoint.finetune_from_model={tmp_path / 'constant.pt'}", "optimization.lr=[0.0]"]
    with pytest.raises(SystemExit, match="collapse at update 6: the student's predictions.*ema_decay"):
        run(train_main, tiny, corpus, tmp_path / "out", *settings, "--save_every", "7")
    assert not list((tmp_path / "out").glob("checkpoints/*.pt"))
