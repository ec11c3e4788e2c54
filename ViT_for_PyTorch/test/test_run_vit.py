"""Training as users run it: end to end, on several ranks, and every way to get it wrong; resume: test_resume.py."""

import json
import os
import subprocess
import sys
from pathlib import Path
from urllib.error import URLError

import pytest
import torch
from PIL import Image

import run_vit
import vit  # noqa: F401
from common import checkpoint_file
from common.errors import UsageError
from common.run import result_file
from vit import engine

PROJECT = Path(__file__).resolve().parents[1]
CASE, EVALUATION = "ViT_for_PyTorch_bs4_1p_acc", "ViT_for_PyTorch_eval_bs4_1p_acc"
TINY = ["model.name=vit_demo", "model.img_size=24", "--batch_size", "4", "--num_workers", "0", "--seed", "3"]
PLAIN = ["data.mixup=0", "data.cutmix=0", "model.drop_path=0"]  # what draws from the rank is off: ranks can be compared


def folders(root: Path) -> list[str]:
    return ["--train_dataset_dir", str(root / "train"), "--eval_dataset_dir", str(root / "val")]


def train(root: Path, output: Path, *options: str) -> dict[str, str]:
    run_vit.main([*folders(root), "--device", "cpu", "--output_dir", str(output), *TINY, *options])
    return result_file.read(next(output.glob("*_acc.log")))


def losses(output: Path) -> dict[int, float]:
    lines = [json.loads(text) for text in (output / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines if line["kind"] == "train"}


def weights(output: Path, name: str) -> dict[str, torch.Tensor]:
    return checkpoint_file.load(output / "checkpoints" / name)["model"]


def torchrun(ranks: int, *arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command += [str(PROJECT / "run_vit.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def test_training_writes_everything_a_user_reads(pictures, tmp_path, capsys, check_profile):
    result = train(pictures, tmp_path, "--epochs", "2", "--log_every", "3", "optimizer.warmup_epochs=1", "--profile")
    assert result["Status"] == "OK" and result["BadImages"] == "0" and result["EvalCount"] == "13"
    assert set(result_file.KEYS) <= set(result)
    printed = capsys.readouterr().out
    assert "------------------ Final result ------------------" in printed and "of 13)" in printed
    assert list(losses(tmp_path)) == [3, 6, 9, 12]
    names = {path.name for path in tmp_path.iterdir()}
    assert {"loss.png", "tensorboard", f"train_{CASE}_loss.txt", f"{CASE}.log"} <= names
    checkpoints = {path.name for path in (tmp_path / "checkpoints").iterdir()}
    assert checkpoints == {"best.pt", "checkpoint-6.pt", "checkpoint-12.pt", "class_names.json"}
    check_profile(tmp_path, "10 to 12", "aten::_fused_adamw_")


def test_two_ranks_equal_one_rank_on_the_same_global_batch(pictures, tmp_path):
    options = ["--epochs", "3", "--log_every", "1", *PLAIN]
    one = train(pictures, tmp_path / "one", *options, "accumulate=2")
    process = torchrun(2, *folders(pictures), *TINY, *options, "--device", "cpu", "--output_dir", str(tmp_path / "two"))
    assert process.returncode == 0, process.stderr
    two = result_file.read(tmp_path / "two" / "ViT_for_PyTorch_bs4_2p_acc.log")
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)
    assert two["TrainAccuracy"] == one["TrainAccuracy"] and two["EvalCount"] == one["EvalCount"] == "13"
    first, second = weights(tmp_path / "one", "checkpoint-9.pt"), weights(tmp_path / "two", "checkpoint-9.pt")
    for key in first:
        # rows of the key bias have no true gradient: AdamW turns their rounding noise into steps
        rows = [slice(0, 96), slice(192, None)] if key.endswith("qkv.bias") else [slice(None)]
        for part in rows:
            torch.testing.assert_close(first[key][part], second[key][part], rtol=1e-4, atol=2e-5)


def test_evaluation_counts_every_picture_once_on_any_number_of_ranks(pictures, tmp_path):
    train(pictures, tmp_path, "--epochs", "1")
    options = ["--run_mode", "eval", "--load_checkpoint", str(tmp_path / "checkpoints" / "best.pt"), "--device", "cpu"]
    options += [*TINY, "--eval_dataset_dir", str(pictures / "val")]
    run_vit.main([*options, "--output_dir", str(tmp_path / "e1")])
    process = torchrun(3, *options, "--output_dir", str(tmp_path / "e3"))
    assert process.returncode == 0, process.stderr
    one, three = (result_file.read(next((tmp_path / name).glob("*.log"))) for name in ("e1", "e3"))
    assert one["Count"] == "13" and all(one[key] == three[key] for key in ("Count", "Top1", "Top5", "TrainAccuracy"))
    assert float(one["ActualLoss"]) == pytest.approx(float(three["ActualLoss"]), abs=2e-6)


def test_an_evaluation_in_the_training_s_folder_takes_nothing_away(pictures, tmp_path):
    """As the scripts do it: train_eval_1p.sh and train_full_1p.sh have the same folder by default."""
    trained = train(pictures, tmp_path, "--epochs", "1", "--log_every", "3")
    before = {path.name for path in tmp_path.iterdir()} | {f"{EVALUATION}.log", "evaluation.json", "confusion.png"}
    plot, logged = (tmp_path / "loss.png").stat().st_mtime_ns, losses(tmp_path)
    options = ["--run_mode", "eval", "--load_checkpoint", str(tmp_path / "checkpoints" / "best.pt"), "--device", "cpu"]
    options += [*TINY, "--eval_dataset_dir", str(pictures / "val"), "--output_dir", str(tmp_path)]
    for _ in range(2):
        run_vit.main(options)
    assert result_file.read(tmp_path / f"{EVALUATION}.log")["Count"] == "13"
    assert result_file.read(tmp_path / f"{CASE}.log") == trained
    assert {path.name for path in tmp_path.iterdir()} == before
    assert losses(tmp_path) == logged and (tmp_path / "loss.png").stat().st_mtime_ns == plot
    result = train(pictures, tmp_path, "--epochs", "2", "--log_every", "3", "--resume_training", "auto")
    assert result["Status"] == "OK" and list(losses(tmp_path)) == [3, 6, 9, 12]


def test_weights_that_cannot_be_downloaded_are_one_line(pictures, tmp_path, monkeypatch):
    def no_network(url, path):
        raise URLError("no route to host")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", no_network)
    with pytest.raises(UsageError, match="cannot download https://.*no route to host.*put it at"):
        train(pictures, tmp_path / "out", "--run_mode", "finetune", "--load_checkpoint", "mae_vit_base_p16")


def test_a_run_with_a_weight_average_is_evaluated_with_it(pictures, tmp_path):
    train(pictures, tmp_path, "--epochs", "2", "optimizer.ema_decay=0.9", "optimizer.warmup_epochs=0")
    lines = [json.loads(text) for text in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    best = max((line for line in lines if line["kind"] == "eval"), key=lambda line: line["top1"])
    options = ["--run_mode", "eval", "--load_checkpoint", str(tmp_path / "checkpoints" / "best.pt"), "--device", "cpu"]
    options += [*TINY, "--eval_dataset_dir", str(pictures / "val"), "--output_dir", str(tmp_path / "eval")]
    run_vit.main(options)
    result = result_file.read(next((tmp_path / "eval").glob("*.log")))
    assert float(result["TrainAccuracy"]) == best["top1"]
    assert float(result["ActualLoss"]) == pytest.approx(best["loss"], abs=2e-6)


def test_few_pictures_frozen_backbone_balanced_classes_and_an_early_stop(pictures, tmp_path):
    options = ["--epochs", "9", "model.train=head", "class_weights=balanced", "metric_for_best=loss", "early_stop=1"]
    result = train(pictures, tmp_path, *options, "optimizer.base_lr=20", "optimizer.warmup_epochs=0", *PLAIN)
    newest = checkpoint_file.newest(tmp_path / "checkpoints")
    steps = int(newest.stem.split("-")[1])
    assert result["Status"] == "OK" and 6 < steps < 54  # stopped after an evaluation that was no better
    kept = [checkpoint_file.load(path)["model"] for path in (newest, tmp_path / "checkpoints" / "best.pt")]
    assert {name for name in kept[0] if not torch.equal(kept[0][name], kept[1][name])} == {"head.weight", "head.bias"}


def test_evaluation_takes_the_model_from_the_checkpoint(pictures, tmp_path):
    """Without the training's options: sizes, pooling and how pictures are prepared are the checkpoint's own."""
    options = ["model.global_pool=token", "data.mean=[0.5,0.5,0.5]", "data.std=[0.5,0.5,0.5]", "data.crop_ratio=1"]
    trained = train(pictures, tmp_path / "run", "--epochs", "1", "--batch_size", "8", *options)
    evaluation = ["--run_mode", "eval", "--load_checkpoint", str(tmp_path / "run"), "--device", "cpu"]
    evaluation += [
        "--eval_dataset_dir",
        str(pictures / "val"),
        "--output_dir",
        str(tmp_path / "e"),
        "--batch_size",
        "8",
    ]
    run_vit.main([*evaluation, "--num_workers", "0"])
    result = result_file.read(next((tmp_path / "e").glob("*.log")))
    assert result["TrainAccuracy"] == trained["TrainAccuracy"] and result["Count"] == "13"


@pytest.mark.parametrize(
    "options",
    [
        ["--precision", "bf16", "model.gradient_checkpointing=true"],
        ["--fp16_opt_level", "O2", "--loss_scale", "128", "--use_combine_grad"],
        ["--precision", "fp16", "optimizer.clip_grad=1"],
        ["model.global_pool=token", "optimizer.layer_decay=1", "data.auto_augment=", "data.random_erasing=0.9"],
    ],
)
def test_variants_of_the_recipe_train(pictures, tmp_path, options):
    result = train(pictures, tmp_path, "--epochs", "2", *PLAIN, "optimizer.warmup_epochs=0", *options)
    assert result["Status"] == "OK"
    values = list(losses(tmp_path).values())
    assert all(0 < value < 3 for value in values)


def test_gradient_checkpointing_and_accumulation_do_not_change_the_numbers(pictures, tmp_path):
    base = ["--epochs", "2", "--log_every", "1", *PLAIN]
    train(pictures, tmp_path / "a", *base, "--batch_size", "8")
    train(pictures, tmp_path / "b", *base, "--batch_size", "8", "model.gradient_checkpointing=true")
    train(pictures, tmp_path / "c", *base, "accumulate=2")
    assert losses(tmp_path / "a") == losses(tmp_path / "b")
    assert losses(tmp_path / "a") == pytest.approx(losses(tmp_path / "c"), rel=1e-5)


def test_a_diverging_run_stops_and_says_failed(pictures, tmp_path):
    with pytest.raises(SystemExit, match="inf or nan at step .*samples .*not applied"):
        train(pictures, tmp_path, "--epochs", "8", "optimizer.base_lr=1e30", "optimizer.warmup_epochs=0")
    result = result_file.read(tmp_path / f"{CASE}.log")
    assert result["Status"] == "FAILED" and "ActualFPS" not in result
    newest = checkpoint_file.newest(tmp_path / "checkpoints")
    if newest is not None:  # what was saved before is finite
        assert all(torch.isfinite(value).all() for value in checkpoint_file.load(newest)["model"].values())


def test_replay_runs_the_batch_that_was_not_finite_and_names_the_first_layer(pictures, tmp_path, monkeypatch):
    whole, calls = engine.to_model_input, []

    def broken(*arguments):
        images, target = whole(*arguments)
        calls.append(1)
        return images * (float("nan") if len(calls) in (4, 5) else 1.0), target

    monkeypatch.setattr(engine, "to_model_input", broken)
    command = ["--epochs", "2", "--save_every", "1"]
    with pytest.raises(SystemExit, match="inf or nan at step 4"):
        train(pictures, tmp_path, *command)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    findings = []
    for _ in range(2):
        train(pictures, tmp_path, *command, "--replay", str(tmp_path / "replay.json"))
        findings.append(result_file.read(tmp_path / "ViT_for_PyTorch_replay_bs4_1p_acc.log")["Replay"])
    assert "not finite again" in findings[0] and "patch_embed.proj on rank 0" in findings[0], findings
    assert findings[1].startswith("finite, the loss is ")
    assert {path: path.read_bytes() for path in before} == before  # nothing is trained, saved or moved
    with pytest.raises(SystemExit, match="seed was 3, is now 4"):
        other = ["--seed", "4", "--replay", str(tmp_path / "replay.json")]
        train(pictures, tmp_path, *command, *other)


def test_a_corrupt_picture_is_skipped_named_and_counted_and_many_are_an_error(tmp_path):
    root = tmp_path / "set"
    for name, colour in (("blue", (0, 0, 200)), ("red", (200, 0, 0))):
        for split, count in (("train", 60), ("val", 2)):
            (root / split / name).mkdir(parents=True)
            for index in range(count):
                Image.new("RGB", (20, 20), colour).save(root / split / name / f"{index:03}.jpg")
    (root / "train" / "red" / "007.jpg").write_bytes(b"not a picture")
    with pytest.warns(UserWarning, match="007.jpg"):
        assert train(root, tmp_path / "out", "--epochs", "2", *PLAIN)["BadImages"] == "1"
    for index in (8, 9):
        (root / "train" / "red" / f"{index:03}.jpg").write_bytes(b"")
    with pytest.warns(UserWarning), pytest.raises(UsageError, match="broken, more than 1%"):
        train(root, tmp_path / "out2", "--epochs", "2", *PLAIN)
    assert result_file.read(tmp_path / "out2" / f"{CASE}.log")["Status"] == "FAILED"


def test_predictions_carry_the_class_names_of_the_training_folder(pictures, tmp_path, capsys):
    train(pictures, tmp_path, "--epochs", "1")
    options = ["--run_mode", "predict", "--load_checkpoint", str(tmp_path / "checkpoints" / "best.pt"), *TINY]
    (tmp_path / "predictions.json").write_text("earlier ones")
    run_vit.main(
        [*options, "--predict_data", str(pictures / "val" / "flags"), "--top_k", "2", "--output_dir", str(tmp_path)]
    )
    assert next((tmp_path / "earlier").glob("*/predictions.json")).read_text() == "earlier ones"
    predictions = json.loads((tmp_path / "predictions.json").read_text())
    assert len(predictions) == 5
    for labels in predictions.values():
        assert [entry["label"] in ("flags", "food_and_drink", "symbols") for entry in labels] == [True, True]
        assert labels[0]["score"] >= labels[1]["score"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--run_mode", "finetune"], "needs --load_checkpoint"),
        (["--run_mode", "eval", "--eval_dataset_dir", "x"], "--load_checkpoint is required for eval"),
        (["--run_mode", "predict", "--load_checkpoint", "x"], "--predict_data is required"),
        (["--train_dataset_dir", "/no/such"], "/no/such: no such folder"),
        (["optimizer.bas_lr=1"], "did you mean 'optimizer.base_lr'"),
        (["--epochs", "three"], "epochs=three"),
        (["--load_checkpoint", "/no/such.pth"], "/no/such.pth: no such checkpoint"),
        (["--resume_training", "/no/such.pt"], "--resume_training /no/such.pt: no such file"),
        (["--batch_size", "100"], "fewer than one global batch"),
        (["--max_steps", "-5"], "max_steps=-5: must be a whole number of at least 0"),
        (["--predict_batch_size", "0"], "--predict_batch_size 0: must be at least 1"),
        (["model.num_classes=7"], "model.num_classes=7, but"),
        (["--config", "gone.yaml"], "--config gone.yaml: no such file"),
        (["--amp_backend", "apex"], "apex has no release for this torch"),
        (["--replay", ""], "--replay is empty"),
        (["model.lora_rank=4"], "model.lora_rank=4: is of model.train=lora"),
        (["metric_for_best=top5"], "metric_for_best=top5 is always 100 % of the 3 classes"),
        (["--load_checkpoint", ""], "--load_checkpoint is empty .a variable of the shell"),
    ],
)
def test_bad_input_is_one_clear_error_before_training(pictures, tmp_path, options, message):
    chosen = folders(pictures) if options[:2] != ["--run_mode", "eval"] else []
    with pytest.raises(UsageError, match=message):
        run_vit.main([*chosen, "--device", "cpu", "--output_dir", str(tmp_path / "out"), *TINY, *options])
    assert not list((tmp_path / "out").glob("*.log"))


def test_class_folders_that_differ_are_an_error(pictures, tmp_path):
    (tmp_path / "val" / "flags").mkdir(parents=True)
    Image.new("RGB", (20, 20)).save(tmp_path / "val" / "flags" / "a.png")
    with pytest.raises(UsageError, match="differ"):
        train(pictures, tmp_path / "out", "--eval_dataset_dir", str(tmp_path / "val"))


def test_options_of_the_reference_are_accepted_with_their_meaning(pictures, tmp_path, capsys):
    options = ["--device_target", "CPU", "--sink_mode", "True", "--use_parallel", "False", "--options", "epochs=1"]
    run_vit.main([*folders(pictures), *TINY, *options, "--optimizer.base_lr", "1e-4", "--output_dir", str(tmp_path)])
    assert "--sink_mode has no effect" in capsys.readouterr().err
    saved = checkpoint_file.load(tmp_path / "checkpoints" / "checkpoint-6.pt")["config"]
    assert saved["epochs"] == 1 and saved["device"] == "cpu" and saved["optimizer"]["base_lr"] == 1e-4


def test_fp8_beside_bf16_and_not_in_its_place(pictures, tmp_path, capsys):
    options = ("--precision", "bf16", "--max_steps", "4", "--log_every", "1", "optimizer.warmup_epochs=0")
    train(pictures, tmp_path / "bf16", *options)
    train(pictures, tmp_path / "fp8", *options, "model.fp8=true", "model.gradient_checkpointing=true")
    ours, theirs = losses(tmp_path / "fp8"), losses(tmp_path / "bf16")
    assert ours != theirs and ours == pytest.approx(theirs, rel=0.005)
    kept = [checkpoint_file.load(tmp_path / name / "checkpoints/checkpoint-4.pt")["model"] for name in ("fp8", "bf16")]
    assert kept[0].keys() == kept[1].keys()
    for refused, message in (
        (["model.fp8=true"], "its products replace bf16's"),
        (["model.fp8=true", "--precision", "bf16", "model.train=lora"], "not with model.train=lora"),
        (["model.fp8=true", "--precision", "bf16", "model.compile=true"], "not with model.compile=true"),
    ):
        with pytest.raises(SystemExit):
            train(pictures, tmp_path / "refused", *refused)
        assert message in capsys.readouterr().err
