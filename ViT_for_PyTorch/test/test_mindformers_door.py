"""What a MindFormers user types: run_mindformer.py, its YAML file and option names, and the API's names."""

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import vit
from common.errors import UsageError
from vit.config import run_config as config

PROJECT = Path(__file__).resolve().parents[1]
# the recipe of the reference, in the places where its file has them; the rest of the file has no meaning here
THEIR_YAML = """
seed: 3
run_mode: train
load_checkpoint: ''
resume_training: False
context: {mode: 0, device_target: Ascend}
runner_config: {epochs: 7, batch_size: 16, image_size: 96, sink_mode: True, num_classes: 1000}
runner_wrapper: {type: MFTrainOneStepCell}
trainer: {type: image_classification, model_name: vit_base_p16}
do_eval: False
train_dataset:
  data_loader: {type: ImageFolderDataset, dataset_dir: pics/train, shuffle: True}
  transforms:
    - {type: RandomResizedCrop, size: 224, scale: [0.3, 1.0]}
    - {type: RandomHorizontalFlip, prob: 0.25}
    - {type: rand_augment_transform, config_str: rand-m7-mstd0.5}
    - {type: RandomErasing, probability: 0.125}
  mixup_op: {mixup_alpha: 0.4, cutmix_alpha: 0.5, cutmix_minmax: , prob: 0.5, switch_prob: 0.3, label_smoothing: 0.2}
  num_parallel_workers: 3
eval_dataset:
  data_loader: {dataset_dir: pics/val}
model:
  model_config: {type: ViTConfig, drop_path_rate: 0.2, use_mean_pooling: True, hidden_act: gelu}
lr_schedule: {type: cosine, learning_rate: 0.001, lr_end: 0.00001, warmup_epochs: 2}
layer_decay: 0.75
optimizer: {type: adamw, beta1: 0.8, beta2: 0.99, eps: 0.0000001, weight_decay: 0.1}
lr_scale_factor: 256
"""


def test_the_references_yaml_is_read(tmp_path):
    path = tmp_path / "theirs.yaml"
    path.write_text(THEIR_YAML)
    ours = config.load(path, ["runner_config.batch_size=8"])
    assert (ours.seed, ours.epochs, ours.batch_size, ours.do_eval, ours.resume_training) == (3, 7, 8, False, "")
    assert (ours.model.img_size, ours.model.drop_path, ours.model.global_pool) == (96, 0.2, "avg")
    data = ours.data
    assert (data.train_dataset_dir, data.eval_dataset_dir, data.num_workers) == ("pics/train", "pics/val", 3)
    assert (data.min_crop_scale, data.horizontal_flip, data.random_erasing) == (0.3, 0.25, 0.125)
    assert (data.auto_augment, data.mixup, data.cutmix) == ("rand-m7-mstd0.5", 0.4, 0.5)
    assert (data.mixup_prob, data.mixup_switch_prob, data.label_smoothing) == (0.5, 0.3, 0.2)
    step = ours.optimizer
    assert (step.base_lr, step.min_lr, step.warmup_epochs, step.layer_decay) == (1e-3, 1e-5, 2, 0.75)
    assert (step.beta1, step.beta2, step.eps, step.weight_decay) == (0.8, 0.99, 1e-7, 0.1)
    path.write_text(THEIR_YAML.replace("type: adamw", "type: momentum"))
    with pytest.raises(UsageError, match="theirs.yaml: optimizer.type: momentum is not supported here, only adamw"):
        config.load(path)


def test_our_recipe_lies_where_the_reference_has_it():
    theirs, ours = (
        config.load(PROJECT / "configs" / folder / "run_vit_base_p16_224_100ep.yaml") for folder in ("vit", "")
    )
    assert theirs == ours and ours.data.train_dataset_dir == "imageNet-1k/train"


def test_the_three_lines_of_the_readme(tmp_path):
    """Train, evaluate and predict as printed there, on a stand-in of ImageNet and of the published weights."""
    generator = np.random.default_rng(0)
    for split in ("train", "val"):
        for name in ("daisy", "bee"):
            folder = tmp_path / "imageNet-1k" / split / name
            folder.mkdir(parents=True)
            for index in range(4):
                pixels = generator.integers(0, 256, (30, 30, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{index}.png")
    shutil.copy(tmp_path / "imageNet-1k" / "val" / "bee" / "0.png", tmp_path / "sunflower.png")
    small = ["model.name=vit_demo", "runner_config.image_size=16", "--device_target", "CPU", "--batch_size", "4"]
    small += ["data.num_workers=0", "--epochs", "1", "--precision", "fp32"]
    recipe = ["--config", str(PROJECT / "configs" / "vit" / "run_vit_base_p16_224_100ep.yaml")]

    def run(*line: str) -> subprocess.CompletedProcess:
        command = [sys.executable, str(PROJECT / "run_mindformer.py"), *recipe, *line, *small]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)

    trained = run("--run_mode", "train")
    assert trained.returncode == 0 and "training from scratch" in trained.stdout, trained.stderr
    weights = ["--load_checkpoint", "output"]
    scored = run("--run_mode", "eval", "--eval_dataset_dir", "imageNet-1k/val", *weights)
    assert "ViT: Top1 Accuracy = {'Top1 Accuracy': " in scored.stdout, scored.stderr
    named = run("--run_mode", "predict", "--predict_data", "sunflower.png", *weights)
    assert named.returncode == 0 and "sunflower.png: " in named.stdout, named.stderr


def test_the_names_of_the_api(tmp_path):
    """The page's names, literally: the answer of a model is the same twice, and a saved one comes back."""
    config = vit.AutoConfig.from_pretrained("vit_demo", num_classes=3)
    assert dict(config)["patch_size"] == config["patch_size"] == 8
    model = vit.AutoModel.from_config(config)
    images = vit.AutoProcessor.from_pretrained("vit_demo")(Image.new("RGB", (60, 50), (9, 99, 199)))["image"]
    assert images.shape == (1, 3, 48, 48)
    assert isinstance(model, vit.ViTForImageClassification) and model.config is config
    torch.nn.init.normal_(model.head.weight)
    assert torch.equal(model(images), model(images))
    model.save_pretrained(tmp_path / "saved", ["a", "b", "c"])
    assert torch.equal(vit.ViTForImageClassification.from_pretrained(tmp_path / "saved")(images), model(images))
    features = vit.ViTModel.from_pretrained(tmp_path / "saved")(images)
    assert features.shape == (1, 96) and torch.equal(model.head(features), model(images))
    assert vit.pipeline("image_classification", model=tmp_path / "saved", device="cpu")(images[0].clamp(0, 1), top_k=1)


@pytest.mark.parametrize("mode", ["eval", "predict"])
def test_a_model_without_published_weights_needs_them_given(mode, tmp_path, monkeypatch, capsys):
    """The door fetches a model's own published weights, never another model's."""
    monkeypatch.syspath_prepend(str(PROJECT))
    import run_vit

    recipe = PROJECT / "configs" / "vit" / "run_vit_base_p16_224_100ep.yaml"
    words = ["--config", str(recipe), "--run_mode", mode, "--eval_dataset_dir", str(tmp_path), "model.name=vit_demo"]
    words += ["--predict_data", str(tmp_path)] if mode == "predict" else []
    with pytest.raises(SystemExit) as ended:
        run_vit.main([*words, "--output_dir", str(tmp_path / "out")], published_weights=True)
    said = capsys.readouterr()
    assert ended.value.code == 2 and f"--load_checkpoint is required for {mode}" in said.err and said.out == ""
