"""Every command of the README, of docs/ and of MindFormers' page, from the folder that it says, on stand-ins.

Python's run in this process, one after another as a reader types them, on data and weights by the README's names; what
`test/*.sh` and the launchers would start on eight devices or two servers is shown by `--dry_run`, and parsed by the
script that it would start. Commands that other tests run are named with those tests.
"""

import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import transformers
from PIL import Image

import convert_weight
import run_vit
import vit
from ci.test import pages
from common import rank_table
from vit.config import options
from vit.model import timm_models, vision_transformer
from vit.weights.labels import imagenet_labels

PROJECT = Path(__file__).resolve().parents[1]
RECIPE = "python run_mindformer.py --config ./configs/vit/run_vit_base_p16_224_100ep.yaml"
REFERENCE = [  # of MindFormers' page, as the table at the top of the README promises them
    f"{RECIPE} --run_mode train",
    f"{RECIPE} --run_mode eval --eval_dataset_dir DIR",
    f"{RECIPE} --run_mode predict --predict_data FILE",
]
ELSEWHERE = {  # a line -> why it is not run here
    "hf download .*": "downloads; `place` has a small model as timm saves it",
    "pip install .*": "installing is `make install`",
    "python -m common.launch.cluster .*": "common/test runs it",
    "python -m common.rank_table check .*": "common/test runs it",
    "python ../common/(hccl_tools|merge_hccl).py .*": "common/test runs both",
    "python -m common.shards .*": "test_sharded.py runs it",
    "python convert_weight.py --to onnx .*": "test_export.py runs it",
    "torchrun --nproc_per_node 8 run_vit.py ...": "test_run_vit.py runs it on two and three ranks",
}
STAND_INS = {
    "/data/imageNet-1k": "imageNet-1k",
    "../.sample_data/images": "imageNet-1k",
    "--data_path=...": "--data_path=imageNet-1k",
    "--ckpt_path=...": "--ckpt_path=mae_vit_base_p16",
    "PICTURE_OR_FOLDER [...]": "imageNet-1k/val",
    "new_pictures": "imageNet-1k/val",
}


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with what the README's lines name: data, published weights, a run's output, a MindSpore file."""
    root = pages.reader_folder(PROJECT, tmp_path_factory.mktemp("reader"))
    (root / "pictures").symlink_to("imageNet-1k")
    theirs = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=7)
    for name in ("vit_small", "folder_of_timm"):
        timm.models.save_for_hf(theirs, root / name, model_args={"img_size": 32}, safe_serialization=True)
    sizes = {"hidden_size": 96, "num_hidden_layers": 1, "num_attention_heads": 3, "intermediate_size": 384}
    config = transformers.ViTConfig(image_size=32, patch_size=8, **sizes)
    transformers.ViTForImageClassification(config).save_pretrained(root / "folder_of_transformers")
    generator = np.random.default_rng(0)
    for split in ("train", "val"):
        for name in ("n02206856", "n11939491"):  # bee, daisy
            folder = root / "imageNet-1k" / split / name
            folder.mkdir(parents=True)
            for index in range(4):
                Image.fromarray(generator.integers(0, 256, (20, 20, 3), dtype=np.uint8)).save(folder / f"{index}.png")
    weights = root / "torch" / "hub" / "checkpoints"
    weights.mkdir(parents=True)
    torch.manual_seed(0)
    model = vit.create_model("vit_demo", 1000, img_size=16)
    torch.nn.init.normal_(model.head.weight)
    encoder = {name: value for name, value in model.state_dict().items() if not name.startswith(("head.", "fc_norm."))}
    encoder |= {"norm.weight": torch.ones(96), "norm.bias": torch.zeros(96)}
    for name, state in (("mae_finetuned_vit_base", model.state_dict()), ("mae_pretrain_vit_base", encoder)):
        torch.save({"model": state}, weights / f"{name}.pth")
        digest = subprocess.run(["sha256sum", weights / f"{name}.pth"], capture_output=True, text=True, check=True)
        (weights / f"{name}.pth.sha256").write_text(digest.stdout)
        shutil.copy(weights / f"{name}.pth", root)
    vit.save_pretrained(vit.create_model("vit_demo", 1000, global_pool="token"), root / "output", imagenet_labels())
    return root


SMALL = ["model.img_size=16", "epochs=1", "max_steps=2", "batch_size=2", "data.num_workers=0"]
SMALL += ["precision=fp32", "device=cpu", "accumulate=1"]


def run_python(words: list[str], place: Path) -> None:
    """One of the project's scripts, in this process; paths of the README's as they are in `place`."""
    script, arguments = words[0], words[1:]
    if script in ("run_vit.py", "run_mindformer.py"):
        arguments = ["imageNet-1k/val" if word in ("DIR", "FILE", "PICTURE_OR_FOLDER") else word for word in arguments]
        arguments = [word for word in arguments if word != "[...]"]
        mode = arguments[arguments.index("--run_mode") + 1]
        output = place / "runs" / f"{mode}{len(list(place.glob('runs/*')))}"
        demo = ["model.name=vit_demo"] if mode in ("train", "finetune") and "vit_small" not in arguments else []
        small = [*SMALL, f"output_dir={output}", *demo]
        run_vit.main([*arguments, "--options", *small], published_weights=script == "run_mindformer.py")
        assert (output / "predictions.json").exists() or list(output.glob("*_acc.log")), words
    elif script == "convert_weight.py":
        convert_weight.main(arguments)
    else:
        raise AssertionError(f"nothing runs {words}")


def run_shell(words: list[str], place: Path) -> None:
    """A script of test/, or run_distribute.sh: what it would start is parsed."""
    if not any(word.startswith("--data_path") for word in words):
        words = [*words, "--data_path=imageNet-1k"]
    for script, *arguments in pages.dry_run(words, place):
        parsed, _ = options.parse(arguments, "")
        assert script == "run_vit.py" and parsed.run_mode in options.RUN_MODES


def test_every_command_of_the_pages_runs(place, monkeypatch):
    monkeypatch.chdir(place)
    monkeypatch.setenv("TORCH_HOME", str(place / "torch"))
    two = [rank_table.generate(f"10.0.0.{n}", {i: f"192.168.{n}.{i + 1}" for i in range(8)}) for n in (1, 2)]
    rank_table.write(rank_table.merge(two), place / "hccl_2s_16p.json")
    (place / "hosts").write_text("10.0.0.1 slots=8\n10.0.0.2 slots=8\n")
    for words in [*pages.lines_to_run(pages.of_project(PROJECT), ELSEWHERE, STAND_INS), *map(str.split, REFERENCE)]:
        if words[0] == "python":
            run_python(words[1:], place)
        else:
            assert words[0] == "bash", words
            run_shell(words, place)
    assert json.loads((place / "my_timm_vit" / "config.json").read_text())["num_classes"] == 1000
    assert (place / "my_hf_vit" / "model.safetensors").is_file() and (place / "vit_base_p16.pth").is_file()
    assert timm.create_model(f"local-dir:{place / 'my_timm_vit'}", pretrained=True).num_classes == 1000


def test_the_snippet_of_the_readme_runs(place, monkeypatch):
    """On the small stand-ins, to which the published names lead; with one epoch of two steps."""
    monkeypatch.setitem(
        vision_transformer.PRESETS, "vit_base_p16", vision_transformer.PRESETS["vit_demo"] | {"image_size": 16}
    )
    (place / "snippet").mkdir()
    monkeypatch.chdir(place / "snippet")
    (place / "snippet" / "imageNet-1k").symlink_to(place / "imageNet-1k")
    monkeypatch.setenv("TORCH_HOME", str(place / "torch"))
    Image.new("RGB", (20, 20), "yellow").save("sunflower.png")
    (code,) = pages.blocks(PROJECT / "README.md", "python")
    overrides = {word.split("=")[0]: word.split("=")[1] for word in SMALL}
    small = f'eval_dataset="imageNet-1k/val", overrides={overrides}'
    code = code.replace('eval_dataset="imageNet-1k/val"', small).replace("size=224", "size=16")
    exec(compile(code, "README.md", "exec"), {})
    assert (place / "snippet" / "my_vit" / "config.json").is_file()


def test_the_small_weights_of_the_pages_are_models_that_load():
    """By timm's own table: the files are out of reach of a test."""
    text = (PROJECT.parent / "docs" / "weights.md").read_text() + (PROJECT / "README.md").read_text()
    names = set(re.findall(r"`(?:timm/)?(vit_(?:tiny|small)_\w+\.\w+)`", text))
    assert len(names) >= 3
    for name in names:
        assert timm.models.get_pretrained_cfg(name).hf_hub_id == f"timm/{name}"
        assert timm_models.config_of_architecture(name).embed_dim in (192, 384)
