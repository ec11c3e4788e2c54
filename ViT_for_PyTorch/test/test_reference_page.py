"""The API examples of MindFormers' ViT page, as printed there but for the imports: on stand-ins of the published
weights, of ImageNet and of the address of the sunflower."""

import hashlib
import io
import re
import urllib.request
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import ImageNetInfo

import vit
from vit.api import trainer as trainer_module
from vit.model import vision_transformer
from vit.weights import download

SUNFLOWER = "https://ascend-repo-modelzoo.obs.cn-east-2.myhuaweicloud.com/XFormer_for_mindspore/clip/sunflower.png"
AUTO_CLASSES = f"""
model = AutoModel.from_pretrained("vit_base_p16")
config = AutoConfig.from_pretrained("vit_base_p16")
model = AutoModel.from_config(config)

img = load_image("{SUNFLOWER}")
image_processor = ViTImageProcessor(size=224)
processed_img = image_processor(img)

predict_result = model(processed_img)
print(predict_result)
"""
TRAINER = f"""
vit_trainer = Trainer(
    task='image_classification',
    model='vit_base_p16',
    train_dataset="imageNet-1k/train",
    eval_dataset="imageNet-1k/val")
img = load_image("{SUNFLOWER}")

vit_trainer.train(resume_or_finetune_from_checkpoint="mae_vit_base_p16", do_finetune=True)
vit_trainer.evaluate(eval_checkpoint=True)
predict_result = vit_trainer.predict(predict_checkpoint=True, input_data=img, top_k=3)
print(predict_result)

vit_trainer.train()
vit_trainer.evaluate(eval_checkpoint=True)
predict_result = vit_trainer.predict(predict_checkpoint=True, input_data=img, top_k=3)
print(predict_result)

vit_trainer.evaluate()
predict_result = vit_trainer.predict(input_data=img, top_k=3)
print(predict_result)
"""
PIPELINE = f"""
pipeline_task = pipeline("image_classification", model='vit_base_p16')
img = load_image("{SUNFLOWER}")
pipeline_result = pipeline_task(img, top_k=3)
print(pipeline_result)
"""
CLASSES = [ImageNetInfo("imagenet-1k").index_to_label_name(index) for index in range(0, 1000, 200)]  # WordNet ids
SHORT = {"epochs": "epochs: 1", "precision": "precision: fp32", "num_workers": "num_workers: 0"}
OURS = "from vit import AutoConfig, AutoModel, Trainer, ViTImageProcessor, load_image, pipeline\n"


@pytest.fixture
def stand_ins(tmp_path, monkeypatch):
    """A working folder with an imageNet-1k of five classes, small weights under the published names, one epoch."""
    monkeypatch.chdir(tmp_path)
    small = {
        **vision_transformer.PRESETS["vit_base_p16"],
        "embed_dim": 32,
        "depth": 1,
        "num_heads": 2,
    }
    monkeypatch.setitem(vision_transformer.PRESETS, "vit_base_p16", small)
    recipe = trainer_module.RECIPES["vit_base_p16"].read_text()
    shorter = tmp_path / "recipe.yaml"
    shorter.write_text(re.sub(r"(?m)^( *)(epochs|precision|num_workers): .*", lambda m: m[1] + SHORT[m[2]], recipe))
    monkeypatch.setitem(trainer_module.RECIPES, "vit_base_p16", shorter)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    download.weights_folder().mkdir(parents=True)
    for name in ("vit_base_p16", "mae_vit_base_p16"):
        published = download.PUBLISHED[name]
        path = download.weights_folder() / published.file_name
        state = vit.create_model("vit_base_p16").state_dict()
        if not published.num_classes:  # an encoder
            state = {key.replace("fc_norm", "norm"): value for key, value in state.items() if "head." not in key}
        torch.save({"model": state}, path)
        digits = hashlib.md5(path.read_bytes()).hexdigest()[:6]
        monkeypatch.setitem(download.PUBLISHED, name, replace(published, md5_prefix=digits))
    generator = np.random.default_rng(0)
    picture = Image.fromarray(generator.integers(0, 256, (40, 40, 3), dtype=np.uint8))
    content = io.BytesIO()
    picture.save(content, "PNG")
    for split in ("train", "val"):
        for name in CLASSES:
            folder = tmp_path / "imageNet-1k" / split / name
            folder.mkdir(parents=True)
            for number in range(8):
                (folder / f"{number}.png").write_bytes(content.getvalue())
    monkeypatch.setattr(urllib.request, "urlopen", lambda url, timeout: io.BytesIO(content.getvalue()))
    return tmp_path


@pytest.mark.parametrize("snippet", [AUTO_CLASSES, TRAINER, PIPELINE], ids=["auto classes", "Trainer", "pipeline"])
def test_a_snippet_of_the_page(stand_ins, snippet, capsys):
    known: dict = {}
    exec(OURS + snippet, known)
    answer = known.get("predict_result", known.get("pipeline_result"))
    if isinstance(answer, torch.Tensor):
        assert answer.shape == (1, 1000) and torch.equal(known["model"](known["processed_img"]), answer)
    else:
        assert [len(row) for row in answer] == [3] and answer[0][0].keys() == {"score", "label"}
    capsys.readouterr()
