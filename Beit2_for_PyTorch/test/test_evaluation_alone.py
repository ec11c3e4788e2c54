"""--eval needs a checkpoint and pictures: not the ranks, batch, layer decay or training set that it was made with."""

import json
import shutil

import pytest
import torch

import beit2
import run_class_finetuning
import run_linear_eval
import run_vqkd_training
from beit2.model.teachers import build_teacher
from beit2.weights.files import read_checkpoint
from common.errors import UsageError

COMMON = "--num_workers 0 --device cpu --epochs 1 --warmup_epochs 0 --batch_size 4".split()
CLASSIFIER = [*COMMON, *"--model beit_test_classifier --input_size 32 --layer_scale_init_value 0.3".split()]
CLASSIFIER += "--imagenet_default_mean_and_std --aa none --reprob 0 --layer_decay 1.0 --model_ema".split()


def last_eval(folder):
    lines = [json.loads(text) for text in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == "eval"][-1]


@pytest.fixture(scope="module")
def classifier(pictures, tmp_path_factory):
    folder = tmp_path_factory.mktemp("classifier")
    data = ["--data_path", str(pictures / "train"), "--eval_data_path", str(pictures / "val")]
    run_class_finetuning.main([*CLASSIFIER, *data, "--output_dir", str(folder)])
    return folder


def test_a_classifier_of_eight_ranks_on_one_without_the_training_set(classifier, pictures, tmp_path):
    checkpoint = read_checkpoint(classifier / "checkpoint.pth")
    checkpoint["progress"] |= {"ranks": 8, "steps_per_epoch": 1, "step": 1}
    checkpoint["optimizer"] = {}
    checkpoint["model"]["head.bias"][:] = torch.tensor([50.0, -50.0])  # not the average's
    torch.save(checkpoint, tmp_path / "eight.pth")
    run = ["--eval", "--eval_data_path", str(pictures / "val"), "--num_workers", "0", "--device", "cpu"]
    run += ["--resume", str(tmp_path / "eight.pth"), "--batch_size", "64", "--output_dir"]
    raw = run_class_finetuning.main([*run, str(tmp_path / "raw")])
    averaged = run_class_finetuning.main([*run, str(tmp_path / "ema"), "--model_ema"])
    assert raw["TrainAccuracy"] == 50 and raw["ActualLoss"] > 20
    assert last_eval(tmp_path / "ema")["loss"] == pytest.approx(last_eval(classifier)["loss"], rel=1e-5)
    assert averaged["ActualLoss"] < 1

    shutil.copytree(pictures / "val/red", tmp_path / "val/red")  # a test set that lacks a class
    part = [*run, str(tmp_path / "part"), "--eval_data_path", str(tmp_path / "val")]
    assert run_class_finetuning.main(part)["TrainAccuracy"] in (0, 100)  # the classes are in the checkpoint
    shutil.copytree(pictures / "val/red", tmp_path / "val/green")
    with pytest.raises(UsageError, match="class folder green does not exist"):
        run_class_finetuning.main(part)


def test_what_cannot_be_evaluated(classifier, pictures, tmp_path):
    val = ["--eval_data_path", str(pictures / "val"), "--device", "cpu", "--output_dir", str(tmp_path)]
    plain = read_checkpoint(classifier / "checkpoint.pth")
    del plain["model_ema"]
    torch.save(plain, tmp_path / "plain.pth")
    torch.save({"model": {"x": torch.zeros(1)}}, tmp_path / "other.pth")
    for extra, message in (
        (["--model_ema", "--resume", str(tmp_path / "plain.pth"), *val], "has no weight average"),
        (["--resume", str(tmp_path / "other.pth"), *val], "has no classifier"),
        (["--resume", str(tmp_path / "plain.pth"), "--device", "cpu"], "--eval needs --eval_data_path"),
        (val, "--eval needs --resume"),
    ):
        with pytest.raises(UsageError, match=message):
            run_class_finetuning.main(["--eval", *extra])


def test_a_probe_and_a_tokenizer_by_their_checkpoints(pictures, tmp_path):
    torch.manual_seed(0)
    model = beit2.create_model("beit_test_cls_pt", img_size=32, vocab_size=32, early_layers=2, head_layers=1)
    torch.save({"model": model.state_dict()}, tmp_path / "pretrained.pth")
    train, val = ["--data_path", str(pictures / "train")], ["--eval_data_path", str(pictures / "val")]
    trained = run_linear_eval.main([
        *"--model beit_test_classifier --input_size 32 --batch_size 8 --epochs 3 --lr 1e-2 --num_workers 0".split(),
        *train, *val, "--pretrained_weights", str(tmp_path / "pretrained.pth"), "--device", "cpu",
        "--output_dir", str(tmp_path / "probe"),
    ])  # fmt: skip
    alone = ["--eval", *val, "--num_workers", "0", "--device", "cpu", "--output_dir", str(tmp_path / "alone")]
    checked = run_linear_eval.main([*alone, "--resume", str(tmp_path / "probe/checkpoint.pth")])
    assert checked["acc1_block4"] == trained["acc1_block4"]

    teacher = build_teacher({"width": 64, "layers": 1, "heads": 2, "output_dim": 12, "patch": 8, "res": 32})
    torch.save(teacher.state_dict(), tmp_path / "clip.pt")
    sizes = "--model vqkd_test_clip --input_size 32 --codebook_n_emd 32 --codebook_emd_dim 8".split()
    teaching = ["--teacher_weight", str(tmp_path / "clip.pt"), "--output_dir", str(tmp_path / "tokenizer")]
    trained = run_vqkd_training.main([*COMMON, *sizes, *train, *val, *teaching])
    checked = run_vqkd_training.main([*alone, "--resume", str(tmp_path / "tokenizer/checkpoint.pth")])
    assert checked["rec_loss"] == pytest.approx(trained["rec_loss"], rel=1e-5)
    assert checked["unused_code"] == trained["unused_code"]
