"""A checkpoint's own description is what is built: of our runs, timm's folders and models, Hugging Face's."""

import json

import pytest
import safetensors.torch
import timm
import torch
from timm.models.vision_transformer import VisionTransformer

import vit
from common.checkpoint_file import CheckpointError
from vit import AutoConfig, AutoModel, AutoProcessor
from vit.config.description import config_of_file
from vit.model import timm_models
from vit.model.vision_transformer import build
from vit.weights import hub_files

TIMM_NAMES = (
    "vit_tiny_patch16_224.augreg_in21k_ft_in1k",
    "vit_small_patch14_reg4_dinov2",
    "vit_base_patch32_384",
    "deit3_small_patch16_224",
    "vit_small_patch16_18x2_224",  # blocks of two branches
    "vit_base_patch16_siglip_224",  # attention pooling, no class token
    "resnet18",
    "eva02_tiny_patch14_224",
)
IMAGES = torch.linspace(-1, 1, 2 * 3 * 32 * 32).reshape(2, 3, 32, 32)


def small(**changes):
    sizes = dict(image_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=4, num_classes=5)
    torch.manual_seed(0)
    model = vit.AutoModel.from_config(vit.ViTConfig(**{**sizes, **changes}))
    torch.nn.init.normal_(model.head.weight, std=0.5)
    return model


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"global_pool": "token"},
        {"reg_tokens": 2, "no_embed_class": True, "layer_scale": True, "qkv_bias": False, "qk_norm": True},
        {"class_token": False, "pre_norm": True, "mlp_ratio": 2.5, "norm_eps": 1e-5, "mean": (0.5, 0.5, 0.5)},
    ],
)
def test_a_saved_model_comes_back_and_timm_reads_it(tmp_path, changes):
    model = small(**changes)
    vit.save_pretrained(model, tmp_path / "m", list("abcde"))
    again = AutoModel.from_pretrained(tmp_path / "m")
    assert again.config == model.config and dict(again.config)["embed_dim"] == 48
    assert torch.equal(again(IMAGES), model(IMAGES)) and not again.training
    assert AutoProcessor.from_pretrained(tmp_path / "m").image_processor.mean == model.config.mean
    if model.config.norm_eps == 1e-6:  # no argument of timm's model
        theirs = timm.create_model(f"local-dir:{tmp_path / 'm'}", pretrained=True).eval()
        torch.testing.assert_close(theirs(IMAGES), model(IMAGES))
    with pytest.raises(FileExistsError):
        vit.save_pretrained(model, tmp_path / "m")
    bare = tmp_path / "w.safetensors"
    safetensors.torch.save_file(model.state_dict(), bare)
    eps = {"norm_eps": model.config.norm_eps}  # and the heads: what no tensor shows
    shown = AutoModel.from_pretrained(bare, AutoConfig.from_pretrained(bare, num_heads=4, **eps))
    assert torch.equal(shown(IMAGES), model(IMAGES))


def test_transformers_reads_what_we_write_and_we_read_what_it_writes(tmp_path):
    from transformers import ViTConfig, ViTForImageClassification

    theirs = ViTForImageClassification(
        ViTConfig(
            hidden_size=48, num_hidden_layers=2, num_attention_heads=4, intermediate_size=192, image_size=32,
            patch_size=8, id2label=dict(enumerate(["ant", "bee", "cat", "dog", "eel"])),
        )
    ).eval()  # fmt: skip
    theirs.save_pretrained(tmp_path / "hf")
    ours = AutoModel.from_pretrained(tmp_path / "hf")
    torch.testing.assert_close(ours(IMAGES), theirs(IMAGES).logits)
    assert (ours.config.norm_eps, ours.config.num_heads, ours.config.global_pool) == (1e-12, 4, "token")
    assert vit.pipeline(model=tmp_path / "hf", device="cpu").labels == ["ant", "bee", "cat", "dog", "eel"]
    back = hub_files.to_hugging_face(ours.state_dict())
    saved = safetensors.torch.load_file(tmp_path / "hf" / "model.safetensors")
    assert back.keys() == saved.keys() and all(torch.equal(back[key], saved[key]) for key in back)
    with pytest.raises(ValueError, match="averages the patches"):
        hub_files.to_hugging_face(small().state_dict())


def test_timm_models_by_name_are_built_as_timm_builds_them():
    """Every VisionTransformer of timm's: the same parameters; other kinds of model are refused by name."""
    built, refused = 0, 0
    for name in TIMM_NAMES:
        try:
            config = timm_models.config_of_architecture(name)
        except ValueError as error:
            refused += 1
            assert name in str(error)
            continue
        built += 1
        with torch.device("meta"):
            theirs = timm.create_model(name)
            ours = build(config)
        shapes = {key: value.shape for key, value in theirs.state_dict().items() if not key.startswith("head.")}
        assert shapes == {k: v.shape for k, v in ours.state_dict().items() if not k.startswith("head.")}, name
        assert isinstance(theirs, VisionTransformer)
    assert (built, refused) == (6, 2)
    augreg = timm_models.config_of_architecture("timm/vit_tiny_patch16_224.augreg_in21k_ft_in1k")
    assert augreg.mean == (0.5, 0.5, 0.5) and augreg.crop_ratio == 0.9 and augreg.global_pool == "token"


def test_foreign_and_broken_folders_are_named(tmp_path):
    model = small()
    vit.save_pretrained(model, tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "resnet18"}))
    with pytest.raises(CheckpointError, match="config.json: timm's resnet18 is a ResNet"):
        config_of_file(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="config.json: not valid JSON"):
        config_of_file(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0cut")
    with pytest.raises(CheckpointError, match="model.safetensors: not a whole safetensors"):
        config_of_file(tmp_path)


def test_a_model_of_timms_own_build_is_loaded_trained_saved_and_read_back(tmp_path):
    """Attention pooling, tanh GELU: what fields of ours cannot say; logits are timm's, on the CPU's path, too."""
    theirs = timm.create_model("test_vit3", img_size=32, num_classes=5).eval()
    torch.nn.init.normal_(theirs.head.weight)
    torch.save(theirs.state_dict(), tmp_path / "w.pth")
    config = timm_models.config_of_architecture("test_vit3", image_size=32, num_classes=5)
    assert config.architecture == "test_vit3" and config.global_pool == "map"
    ours = AutoModel.from_pretrained(tmp_path / "w.pth", config)
    vit.cpu_patches.apply(ours, torch.device("cpu"))
    torch.testing.assert_close(ours(IMAGES), theirs(IMAGES))
    vit.save_pretrained(ours, tmp_path / "m")
    assert torch.equal(AutoModel.from_pretrained(tmp_path / "m")(IMAGES), ours(IMAGES))
    again = timm.create_model(f"local-dir:{tmp_path / 'm'}", pretrained=True).eval()
    torch.testing.assert_close(again(IMAGES), theirs(IMAGES))
    groups = vit.layer_decay_groups(ours, 0.1, 0.5)
    assert sum(len(group["params"]) for group in groups) == len(list(ours.parameters()))


@pytest.mark.parametrize("name, classes", [("test_vit", 0), ("test_vit3", 5)])
def test_a_folder_that_timm_wrote_is_read_also_without_a_classifier(tmp_path, capsys, name, classes):
    theirs = timm.create_model(name, img_size=32, num_classes=classes).eval()
    timm.models.save_for_hf(theirs, tmp_path, safe_serialization=True)
    ours = vit.ViTModel.from_pretrained(tmp_path)
    torch.testing.assert_close(ours(IMAGES), theirs.forward_head(theirs.forward_features(IMAGES), pre_logits=True))
    assert capsys.readouterr().err == ""
    classifier = AutoModel.from_pretrained(tmp_path)
    if classes:
        torch.testing.assert_close(classifier(IMAGES), theirs(IMAGES))
    assert ("has no classifier" in capsys.readouterr().err) == (classes == 0)
