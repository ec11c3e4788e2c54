"""Exported checkpoints, loaded by timm and transformers, give the outputs that ours give."""

import argparse

import pytest
import torch

import beit2
import export_weights
from beit2.model.from_weights import encoder_from_weights
from beit2.model.tokenizer import load_tokenizer_weights
from beit2.weights.files import read_state_dict
from common.errors import UsageError

SHAPE = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2}
IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def drawn(model):
    """The model with weights that leave nothing at zero or one."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model.eval()


def saved(model, path, **args):
    torch.save({"model": model.state_dict(), "args": argparse.Namespace(**args)}, path)
    return str(path)


@pytest.fixture
def pretraining(tmp_path):
    config = SHAPE | {"vocab_size": 24, "early_layers": 2, "use_shared_rel_pos_bias": True, "init_values": 0.1}
    model = drawn(beit2.build_pretraining_model(**config))
    return model, saved(model, tmp_path / "pretraining.pth", imagenet_default_mean_and_std=True)


@pytest.fixture(params=[{}, {"use_mean_pooling": False}, {"use_rel_pos_bias": False, "use_abs_pos_emb": True}])
def classifier(tmp_path, request):
    config = SHAPE | {"num_classes": 5, "use_rel_pos_bias": True, "use_abs_pos_emb": False, "init_values": 0.1}
    config |= request.param | ({"num_heads": 1} if "use_abs_pos_emb" in request.param else {})
    model = drawn(beit2.build_classifier(**config))
    return model, saved(model, tmp_path / "classifier.pth")


def export(path, to, folder):
    export_weights.main(["--checkpoint", path, "--to", to, "--output", str(folder)])
    return folder


def close(ours, theirs):
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-5 * float(ours.abs().max()))


@torch.no_grad()
def test_timm_loads_a_classifier(classifier, tmp_path):
    import timm

    model, path = classifier
    loaded = timm.create_model(f"local-dir:{export(path, 'timm', tmp_path / 'timm')}", pretrained=True).eval()
    close(model(IMAGES), loaded(IMAGES))
    assert list(loaded.pretrained_cfg["mean"]) == [0.5, 0.5, 0.5]


@torch.no_grad()
def test_timm_loads_a_pretrained_encoder(pretraining, tmp_path):
    import timm

    model, path = pretraining
    loaded = timm.create_model(f"local-dir:{export(path, 'timm', tmp_path / 'timm')}", pretrained=True).eval()
    (main, _) = model.forward_features(IMAGES)  # normalised patch states
    close(main, loaded.forward_features(IMAGES)[:, 1:])
    assert list(loaded.pretrained_cfg["mean"]) == [0.485, 0.456, 0.406]


@torch.no_grad()
def test_transformers_load_a_classifier(classifier, tmp_path):
    from transformers import BeitForImageClassification, BeitImageProcessor, BeitModel

    model, path = classifier
    folder = export(path, "transformers", tmp_path / "hf")
    close(model(IMAGES), BeitForImageClassification.from_pretrained(folder).eval()(IMAGES).logits)
    features = encoder_from_weights({k: v for k, v in model.state_dict().items() if not k.startswith("head")})
    close(features(IMAGES), BeitModel.from_pretrained(folder).eval()(IMAGES).pooler_output)
    assert list(BeitImageProcessor.from_pretrained(folder).image_mean) == [0.5, 0.5, 0.5]


@torch.no_grad()
def test_transformers_load_a_masked_image_model(pretraining, tmp_path):
    from transformers import BeitForMaskedImageModeling

    model, path = pretraining
    loaded = BeitForMaskedImageModeling.from_pretrained(export(path, "transformers", tmp_path / "hf")).eval()
    mask = torch.arange(16).expand(2, 16) % 3 == 0
    close(model(IMAGES, mask, return_all_tokens=True)[0], loaded(IMAGES, bool_masked_pos=mask).logits)


def test_safetensors_of_a_tokenizer_give_the_same_tokens(tmp_path):
    config = {"img_size": 32, "n_code": 32, "code_dim": 8, "decoder_out_dim": 16}
    tokenizer = drawn(beit2.create_tokenizer("vqkd_test_clip", **config))
    path = saved(tokenizer, tmp_path / "tokenizer.pth")
    folder = export(path, "safetensors", tmp_path / "out")
    other = beit2.create_tokenizer("vqkd_test_clip", **config).eval()
    load_tokenizer_weights(other, folder / "model.safetensors")
    pictures = torch.rand(2, 3, 32, 32)
    assert torch.equal(tokenizer.get_codebook_indices(pictures), other.get_codebook_indices(pictures))
    for to in ("timm", "transformers"):
        with pytest.raises(UsageError, match="has no VQ-KD tokenizer"):
            export(path, to, tmp_path / to)
    with pytest.raises(UsageError, match="is not empty"):
        export(path, "safetensors", folder)


def test_safetensors_of_a_model_and_what_is_no_model(pretraining, tmp_path):
    model, path = pretraining
    state = read_state_dict(export(path, "safetensors", tmp_path / "out") / "model.safetensors")
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
    torch.save({"x": torch.zeros(1)}, tmp_path / "x.pth")
    with pytest.raises(UsageError, match="there is no cls_token"):
        export(str(tmp_path / "x.pth"), "timm", tmp_path / "no")
    assert not (tmp_path / "no").exists()
