"""run_vqkd_training.py, run_class_finetuning.py and run_linear_eval.py: training, exact resume, files, errors."""

import json
import os
import re
import signal

import pytest
import torch
from PIL import Image
from small_models import OPTIONS

import beit2
import run_beitv2_pretraining
import run_class_finetuning
import run_linear_eval
import run_vqkd_training
from beit2.codebook_figure import codebook_use
from beit2.data.labelled import find_classes
from beit2.weights.files import read_checkpoint
from common.errors import PREEMPTED, UsageError
from common.run import preemption

TOKENIZER = (
    "--model vqkd_test_clip --input_size 32 --codebook_n_emd 32 --codebook_emd_dim 8 --quantize_kmeans_init --epochs 2 "
    "--batch_size 4 --warmup_epochs 1 --num_workers 0 --device cpu --log_every 1 --opt_betas 0.9 0.99"
).split()
CLASSIFIER = (
    "--model beit_test_classifier --input_size 32 --epochs 2 --batch_size 4 --warmup_epochs 1 --num_workers 0 "
    "--device cpu --log_every 1 --aa rand-m9-mstd0.5-inc1 --lr 1e-3"
).split()


PROBE = (
    "--model beit_test_classifier --input_size 32 --batch_size 8 --epochs 6 --lr 1e-2 --num_workers 0 --device cpu"
).split()


def data_of(pictures):
    return ["--data_path", str(pictures / "train"), "--eval_data_path", str(pictures / "val")]


@pytest.fixture(scope="module")
def teacher_file(tmp_path_factory):
    from beit2.model.teachers import build_teacher

    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("teacher") / "clip.pt"
    teacher = build_teacher({"width": 64, "layers": 1, "heads": 1, "output_dim": 12, "patch": 8, "res": 32})
    torch.save(teacher.state_dict(), path)
    return path


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("pretrained") / "checkpoint.pth"
    model = beit2.create_model("beit_test_cls_pt", img_size=32, vocab_size=32, early_layers=2, head_layers=1)
    torch.save({"model": model.state_dict()}, path)
    return path


def losses(folder):
    lines = [json.loads(text) for text in (folder / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines if line["kind"] == "train"}


def stop_in_evaluation(script, start):
    """A signal at the first batch of a script's first evaluation, which ends with a checkpoint."""

    def until_asked(batches):
        os.kill(os.getpid(), signal.SIGTERM)
        return preemption.until_asked(batches)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as stopped:
        patch.setattr(script, "until_asked", until_asked)
        start()
    assert stopped.value.code == PREEMPTED


def same_weights(a, b):
    a, b = (read_checkpoint(folder / "checkpoint.pth")["model"] for folder in (a, b))
    return list(a) == list(b) and all(torch.equal(a[name], b[name]) for name in a)


def test_tokenizer_training_and_resume(pictures, teacher_file, tmp_path):
    def run(name, *extra):
        output = ["--teacher_weight", str(teacher_file), "--output_dir", str(tmp_path / name)]
        return run_vqkd_training.main([*TOKENIZER, *data_of(pictures), *output, *extra])

    result = run("whole")
    assert 0 <= result["unused_code"] <= 32 and result["total_loss"] > 0
    assert result["TrainAccuracy"] == pytest.approx(100 * (1 - result["rec_loss"]), abs=1e-2)
    stop_in_evaluation(run_vqkd_training, lambda: run("cut"))
    assert max(losses(tmp_path / "cut")) == 4  # an epoch has four steps
    run("cut")
    assert (tmp_path / "whole/log.txt").read_text() == (tmp_path / "cut/log.txt").read_text()
    assert losses(tmp_path / "whole") == losses(tmp_path / "cut")
    assert same_weights(tmp_path / "whole", tmp_path / "cut")
    log = [json.loads(text) for text in (tmp_path / "cut/log.txt").read_text().splitlines()]
    names = "loss total_loss quant_loss rec_loss lr min_lr weight_decay grad_norm Unused_code".split()
    assert {f"train_{name}" for name in names} | {"test_loss", "test_rec_loss", "test_unused_code"} <= set(log[1])

    # the file is a tokenizer for pretraining; --eval changes nothing in it
    tokenizer = beit2.create_tokenizer(
        "vqkd_test_clip", tmp_path / "whole/checkpoint.pth", img_size=32, n_code=32, code_dim=8, decoder_out_dim=12
    )
    norms = tokenizer.quantize.embedding.weight.norm(dim=1)
    torch.testing.assert_close(norms, torch.ones(32))
    checked = run("eval", "--eval", "--resume", str(tmp_path / "whole/checkpoint.pth"))
    assert checked["rec_loss"] == pytest.approx(result["rec_loss"], abs=1e-6)


def test_a_tokenizer_of_another_patch_size_whose_dead_codes_come_back(pictures, tmp_path, capsys):
    """As for a CLIP B/32 teacher; stopped between two epochs the codes that come back are the same."""
    from beit2.model.teachers import build_teacher

    torch.manual_seed(0)
    shape = {"width": 64, "layers": 1, "heads": 1, "output_dim": 12, "patch": 16, "res": 32}
    torch.save(build_teacher(shape).state_dict(), tmp_path / "clip.pt")

    def run(name, *extra):
        options = ["--teacher_weight", str(tmp_path / "clip.pt"), "--output_dir", str(tmp_path / name), "--epochs", "3"]
        run_vqkd_training.main([*TOKENIZER, "--codebook_n_emd", "64", *data_of(pictures), *options, *extra])

    revived = ("--patch_size", "16", "--revive_dead_codes")
    run("whole", *revived)
    told = re.findall(r"(\d+) of 64 codes were not used in this epoch", capsys.readouterr().out)
    assert len(told) == 2 and int(told[0]) > 0
    for steps in ("4", "8", "12"):
        run("cut", *revived, "--max_steps", steps)
    assert same_weights(tmp_path / "whole", tmp_path / "cut")
    run("without", "--patch_size", "16")
    assert not same_weights(tmp_path / "whole", tmp_path / "without")
    curves = codebook_use(tmp_path / "cut", codes=64, steps=4)
    assert [epoch for epoch, _ in curves["used in training"]] == [1, 2, 3]
    assert [64 - used for _, used in curves["used in training"]][:2] == [int(count) for count in told]
    assert set(curves) == {"used in training", "used by held-out pictures", "used as evenly as"}
    assert Image.open(tmp_path / "cut/codebook_use.png").size[0] > 400
    pretraining = [*OPTIONS, "--tokenizer_weight", str(tmp_path / "whole/checkpoint.pth"), "--patch_size", "16"]
    pretraining += ["--codebook_size", "64", "--num_mask_patches", "2", "--min_mask_patches_per_block", "1"]
    pretraining += ["--data_path", str(pictures / "train"), "--model", "beit_test", "--max_steps", "1"]
    run_beitv2_pretraining.main([*pretraining, "--output_dir", str(tmp_path / "pretraining")])
    with pytest.raises(UsageError, match=r"gives the tokenizer \(2, 2\) patches, the model has \(4, 4\)"):
        run_beitv2_pretraining.main([*pretraining, "--patch_size", "8", "--output_dir", str(tmp_path / "x")])
    with pytest.raises(UsageError, match="--patch_size 5: --input_size 32 must be a multiple"):
        run("x", "--patch_size", "5")


def test_tokenizer_training_errors(pictures, teacher_file, tmp_path, pretrained):
    data = ["--data_path", str(pictures / "train"), "--output_dir", str(tmp_path)]
    with pytest.raises(UsageError) as caught:
        run_vqkd_training.main([*TOKENIZER, *data])
    assert "--teacher_weight is missing" in caught.value.message
    with pytest.raises(UsageError) as caught:
        run_vqkd_training.main([*TOKENIZER, *data, "--teacher_weight", str(pretrained)])
    assert "no CLIP vision tower" in caught.value.message
    with pytest.raises(UsageError) as caught:
        run_vqkd_training.main([*TOKENIZER, *data, "--teacher_weight", str(teacher_file), "--input_size", "48"])
    assert (
        "32 pixels in patches of 8, the tokenizer 48 in patches of 8: give --input_size 32 --patch_size 8"
        in caught.value.message
    )
    with pytest.raises(UsageError) as caught:
        run_vqkd_training.main([*TOKENIZER, *data, "--teacher_weight", str(teacher_file), "--eval"])
    assert "need --resume" in caught.value.message
    with pytest.raises(UsageError) as caught:  # before an epoch is trained for nothing
        run_vqkd_training.main([*TOKENIZER, *data, "--teacher_weight", str(teacher_file), "--eval_data_path", "typo"])
    assert "--eval_data_path typo: no such folder" in caught.value.message
    assert not (tmp_path / "metrics.jsonl").exists()


def test_finetuning_and_resume(pictures, pretrained, tmp_path):
    extra = ["--mixup", "0.8", "--cutmix", "1.0", "--model_ema", "--layer_decay", "0.65", "--finetune", str(pretrained)]

    def run(name, *more):
        return run_class_finetuning.main(
            [*CLASSIFIER, *data_of(pictures), *extra, "--output_dir", str(tmp_path / name), *more]
        )

    result = run("whole")
    assert 0 <= result["TrainAccuracy"] <= 100 and result["BestAccuracy"] >= result["TrainAccuracy"]
    stop_in_evaluation(run_class_finetuning, lambda: run("cut"))
    assert max(losses(tmp_path / "cut")) == 4  # an epoch has four steps
    for resumed in (run("cut", "--num_workers", "1"), run("cut")):  # the second has nothing left to do
        assert all(resumed[key] == result[key] for key in ("TrainAccuracy", "BestAccuracy"))
    assert losses(tmp_path / "whole") == losses(tmp_path / "cut")
    assert same_weights(tmp_path / "whole", tmp_path / "cut")
    checkpoint = read_checkpoint(tmp_path / "whole/checkpoint.pth")
    assert {"model", "optimizer", "epoch", "scaler", "args", "model_ema"} <= set(checkpoint)
    assert not torch.equal(checkpoint["model"]["head.weight"], checkpoint["model_ema"]["head.weight"])
    log = [json.loads(text) for text in (tmp_path / "cut/log.txt").read_text().splitlines()]
    assert {"train_loss", "test_acc1", "test_acc5", "test_loss", "epoch", "n_parameters"} <= set(log[1])
    for name in ("eval", "whole"):  # the second stays a run that can go on
        evaluated = run(name, "--eval", "--resume", str(tmp_path / "whole/checkpoint-best.pth"))
        assert evaluated["TrainAccuracy"] == pytest.approx(result["BestAccuracy"])
    assert (tmp_path / "whole/checkpoint.pth").exists()


def test_plain_augmentation_learns_two_colours(pictures, tmp_path):
    """From scratch, crop and flip only: red and blue are told apart in a few epochs."""
    result = run_class_finetuning.main([
        *CLASSIFIER, "--aa", "none", "--reprob", "0", "--color_jitter", "0", "--epochs", "12", "--use_cls",
        "--layer_decay", "1.0", "--drop_path", "0", "--init_scale", "1", "--smoothing", "0", "--lr", "3e-3",
        *data_of(pictures), "--output_dir", str(tmp_path),
    ])  # fmt: skip
    assert result["BestAccuracy"] == 100


def test_the_reference_s_folder_layouts(pictures, pretrained, tmp_path):
    """ImageNet's train/ and val/ under one --data_path, and the linear probe's own option names."""
    run = ["--data_path", str(pictures), "--max_steps", "1", "--output_dir"]
    result = run_class_finetuning.main([*CLASSIFIER, "--data_set", "IMNET", *run, str(tmp_path / "finetuned")])
    assert 0 <= result["TrainAccuracy"] <= 100
    own = "--batch_size_per_gpu 8 --optimizer sgd --num_labels 2 --val_freq 2 --amp_forward False --rel_pos_bias "
    own += "--imagenet_default_mean_and_std False --avgpool_patchtokens True --patch_size 8 --lr 1e-2 --epochs 3"
    weights = ["--pretrained_weights", str(pretrained), "--data_path", str(pictures)]
    probe = ["--model", "beit_test_classifier", "--input_size", "32", "--num_workers", "0", "--device", "cpu"]
    run_linear_eval.main([*probe, *weights, *own.split(), "--output_dir", str(tmp_path / "probe")])
    log = [json.loads(text) for text in (tmp_path / "probe/log.txt").read_text().splitlines()]
    assert ["test_acc1" in line for line in log] == [True, False, True]
    with pytest.raises(UsageError) as caught:
        run_linear_eval.main([*probe, *weights, "--num_labels", "3", "--output_dir", str(tmp_path / "x")])
    assert "--num_labels 3" in caught.value.message


def test_tokenizer_encoder_can_be_finetuned(pictures, tokenizer_file, tmp_path):
    result = run_class_finetuning.main([
        *CLASSIFIER, "--disable_rel_pos_bias", "--abs_pos_emb", "--layer_scale_init_value", "0", "--max_steps", "1",
        "--model", "beit_test_encoder", "--model_filter_name", "encoder", "--finetune", str(tokenizer_file),
        "--data_path", str(pictures / "train"), "--output_dir", str(tmp_path),
    ])  # fmt: skip
    assert result["Status"] == "OK"


def test_finetuning_errors(pictures, pretrained, tokenizer_file, tmp_path):
    data = ["--data_path", str(pictures / "train"), "--output_dir", str(tmp_path)]
    for extra, message in (
        (["--finetune", str(tokenizer_file)], "weights of the blocks are missing"),
        (["--nb_classes", "5"], "--nb_classes 5: .* has 2 class folders"),
        (["--mixup", "0.5", "--batch_size", "3"], "give an even number"),
        (["--model", "beit_test"], "not a fine-tuning model"),
        (["--eval"], "--eval needs"),
        (["--aa", "nonsense"], "--aa nonsense .*Unknown AA policy"),
        (["--remode", "nonsense"], "--remode nonsense: refused by timm"),
        (["--cutmix_minmax", "0.2"], "--cutmix_minmax .*two numbers"),
        (["--smoothing", "1.5"], "--smoothing 1.5"),
        (["--drop_path", "1"], "--drop_path 1.0: must be"),
        (["--data_set", "IMNET"], "train/train: no such folder"),
    ):
        with pytest.raises(UsageError) as caught:
            run_class_finetuning.main([*CLASSIFIER, *data, *extra])
        assert re.search(message, caught.value.message), caught.value.message


def test_linear_probe(pictures, pretrained, tmp_path):
    def run(name, *extra):
        output = ["--pretrained_weights", str(pretrained), "--output_dir", str(tmp_path / name)]
        return run_linear_eval.main([*PROBE, *data_of(pictures), *output, *extra])

    result = run("whole")
    assert result["TrainAccuracy"] == 100  # the colours are in the features of any encoder
    assert {f"acc1_block{i}" for i in range(1, 5)} <= set(result)
    run("cut", "--max_steps", "5")  # an epoch has two steps
    stop_in_evaluation(run_linear_eval, lambda: run("cut"))
    cut = run("cut")
    assert {name: cut[name] for name in cut if name.startswith("acc1")} == {
        name: result[name] for name in result if name.startswith("acc1")
    }
    assert same_weights(tmp_path / "whole", tmp_path / "cut")
    assert (tmp_path / "whole/log.txt").read_text() == (tmp_path / "cut/log.txt").read_text()

    # the best accuracy outlives a resume that does not reach it again
    checkpoint = read_checkpoint(tmp_path / "cut/checkpoint.pth")
    torch.save(checkpoint | {"best_acc1": 101.0}, tmp_path / "cut/checkpoint.pth")
    assert run("cut")["TrainAccuracy"] == 101
    with pytest.raises(UsageError) as caught:
        run_linear_eval.main([*PROBE, *data_of(pictures), "--output_dir", str(tmp_path)])
    assert "--pretrained_weights is missing" in caught.value.message


def test_classes(pictures):
    paths, labels, names = find_classes(pictures / "train")
    assert names == ["blue", "red"] and sorted(set(labels)) == [0, 1] and len(paths) == 16
    with pytest.raises(UsageError) as caught:
        find_classes(pictures / "train", ["red"])
    assert "blue does not exist in the training set" in caught.value.message
    with pytest.raises(UsageError) as caught:
        find_classes(pictures)
    assert "holds train/ and val/, not classes" in caught.value.message
