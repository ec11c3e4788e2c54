"""Trainer by keyword: the three ways of the README on a tiny set, and errors before any training."""

import numpy as np
import pytest
import torch
from PIL import Image

from common.errors import UsageError
from vit import Trainer
from vit.api import trainer as trainer_module

TINY = {
    "model.img_size": 16,
    "epochs": 1,
    "batch_size": 4,
    "data.num_workers": 0,
    "device": "cpu",
    "optimizer.warmup_epochs": 0,
}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    root = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for split, count in (("train", 8), ("val", 3)):
        for label, level in (("dark", 40), ("light", 210)):
            for index in range(count):
                path = root / split / label / f"{index}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(rng.integers(level - 30, level + 30, (20, 20, 3), dtype=np.uint8)).save(path)
    return root


def make(pictures, folder, **overrides):
    return Trainer(
        task="image_classification",
        model="vit_demo",
        train_dataset=pictures / "train",
        eval_dataset=pictures / "val",
        output_dir=folder,
        overrides={**TINY, **overrides},
    )


def test_train_evaluate_predict_then_finetune(pictures, tmp_path):
    trainer = make(pictures, tmp_path / "first")
    result = trainer.train()
    assert result["EvalCount"] == 6
    score = trainer.evaluate(eval_checkpoint=True)
    assert score["Count"] == 6 and score["Top1"] == round(result["TrainAccuracy"] / 100 * 6)
    images = [Image.new("RGB", (30, 20), (210,) * 3), pictures / "val" / "dark" / "0.png"]
    prediction = trainer.predict(predict_checkpoint=True, input_data=images, top_k=None)
    assert [{entry["label"] for entry in row} for row in prediction] == [{"dark", "light"}] * 2
    assert len(trainer.predict(predict_checkpoint=True, input_data=images[0])[0]) == 1

    weights = tmp_path / "first" / "checkpoints" / "checkpoint-4.pt"
    tuned = make(pictures, tmp_path / "second", max_steps=1)
    tuned.train(resume_or_finetune_from_checkpoint=str(weights), do_finetune=True)
    tuned_state = torch.load(tmp_path / "second" / "checkpoints" / "checkpoint-1.pt", weights_only=True)
    first_state = torch.load(weights, weights_only=True)
    difference = tuned_state["model"]["pos_embed"] - first_state["model"]["pos_embed"]
    assert tuned_state["state"]["step"] == 1 and difference.abs().max() < 0.01


def test_an_interrupted_run_is_resumed(pictures, tmp_path):
    make(pictures, tmp_path / "whole").train()
    make(pictures, tmp_path / "parts", max_steps=2).train()
    make(pictures, tmp_path / "parts").train(resume_training=True)
    whole, parts = (
        torch.load(tmp_path / name / "checkpoints" / "checkpoint-4.pt", weights_only=True)["model"]
        for name in ("whole", "parts")
    )
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


@pytest.mark.parametrize(
    "arguments, load, resume",
    [
        ({}, "", ""),
        ({"train_checkpoint": "w.pth"}, "w.pth", ""),
        ({"train_checkpoint": "run.pt", "resume_training": True}, "", "run.pt"),
        ({"resume_training": True}, "", "auto"),
        ({"resume_training": "run.pt"}, "", "run.pt"),
        ({"resume_or_finetune_from_checkpoint": True}, "", "auto"),
        ({"resume_or_finetune_from_checkpoint": "run.pt"}, "", "run.pt"),
        ({"resume_or_finetune_from_checkpoint": "mae_vit_base_p16", "do_finetune": True}, "mae_vit_base_p16", ""),
    ],
)
def test_checkpoint_arguments_mean_what_the_reference_means(pictures, tmp_path, monkeypatch, arguments, load, resume):
    seen = []
    monkeypatch.setattr(trainer_module.engine, "train", seen.append)
    make(pictures, tmp_path).train(**arguments)
    assert (seen[0].load_checkpoint, seen[0].resume_training) == (load, resume)


def test_the_recipe_of_the_model_is_used(tmp_path):
    config = Trainer(model="mindspore/vit_base_p16", train_dataset="imageNet-1k/train", output_dir=tmp_path).config()
    assert config.model.name == "vit_base_p16" and config.epochs == 100 and not config.do_eval
    assert config.optimizer.layer_decay == 0.65 and config.data.train_dataset_dir == "imageNet-1k/train"


def test_without_folders_nothing_is_scored_or_trained(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trainer = Trainer(model="vit_demo", output_dir=tmp_path / "out", overrides=TINY)
    with pytest.raises(ValueError, match="eval_dataset='imageNet-1k/val'"):
        trainer.evaluate(eval_checkpoint="w.pth")
    with pytest.raises(ValueError, match="train_dataset='imageNet-1k/train'"):
        trainer.train()
    assert not (tmp_path / "out").exists()


def test_errors_come_before_training(pictures, tmp_path):
    with pytest.raises(ValueError, match="text_generation"):
        Trainer(task="text_generation")
    with pytest.raises(ValueError, match="resnet50.*vit_base_p16"):
        Trainer(model="resnet50")
    with pytest.raises(UsageError, match="optimizer.base_lr"):
        make(pictures, tmp_path, **{"optimizer.base_l": 1})
    with pytest.raises(ValueError, match="no checkpoint in .*never"):
        make(pictures, tmp_path / "never").evaluate(eval_checkpoint=True)
    with pytest.raises(ValueError, match="needs weights"):
        make(pictures, tmp_path).train(do_finetune=True)
    with pytest.raises(ValueError, match="input_data"):
        make(pictures, tmp_path).predict(predict_checkpoint=True)
    with pytest.raises(UsageError, match="no such folder"):
        make(tmp_path / "gone", tmp_path / "out").train()
