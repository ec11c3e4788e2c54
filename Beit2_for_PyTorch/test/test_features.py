"""extract_features.py and print_tokens.py: the numbers of the model itself, from whatever holds its weights."""

import argparse
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import beit2
import export_weights
import extract_features
import print_tokens
from beit2.data.labelled import CentreCrop
from beit2.data.reading import read_image
from beit2.weights.files import read_state_dict
from common.errors import UsageError

SHAPE = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2}
COMMON = ["--num_workers", "0", "--device", "cpu"]
MEAN, STD = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1), torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)


def saved(model, path, **more):
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    torch.save(
        {"model": model.state_dict(), "args": argparse.Namespace(imagenet_default_mean_and_std=True)} | more, path
    )
    return str(path)


@pytest.fixture(scope="module")
def pretraining(tmp_path_factory):
    config = SHAPE | {"vocab_size": 24, "early_layers": 2, "use_shared_rel_pos_bias": True, "init_values": 0.1}
    model = beit2.build_pretraining_model(**config).eval()
    return model, saved(model, tmp_path_factory.mktemp("pretraining") / "checkpoint.pth")


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    config = SHAPE | {"num_classes": 5, "use_rel_pos_bias": True, "use_abs_pos_emb": False, "init_values": 0.1}
    model = beit2.build_classifier(**config).eval()
    return model, saved(model, tmp_path_factory.mktemp("classifier") / "checkpoint.pth")


def extract(weights, folder, output, *extra):
    extract_features.main(["--checkpoint", str(weights), "--data_path", str(folder), "--output", str(output),
                           *COMMON, *extra])  # fmt: skip
    return np.load(output) if output.suffix == ".npy" else output


def images_of(folder):
    """The pictures that an evaluation sees, normalised, and their names, in order."""
    paths = sorted(path for path in Path(folder).rglob("*") if path.is_file())
    pixels = torch.stack([CentreCrop(32)(read_image(path)) for path in paths])
    unit = pixels.permute(0, 3, 1, 2).float() / 255
    return (unit - MEAN) / STD, [str(path.relative_to(folder)) for path in paths]


@torch.no_grad()
def test_a_pretraining_checkpoint_and_all_its_exports(pretraining, pictures, tmp_path):
    model, path = pretraining
    images, names = images_of(pictures)
    mean = extract(path, pictures, tmp_path / "mean.npy")  # train and val, since it trains nothing
    assert (tmp_path / "mean.names.txt").read_text().splitlines() == names and len(names) == 24
    expected = model.forward_features(images)[0].mean(dim=1)
    np.testing.assert_allclose(mean, expected, atol=1e-5)
    both = extract(path, pictures, tmp_path / "both.npy", "--pool", "cls_mean", "--batch_size", "5")
    np.testing.assert_allclose(both[:, 32:], mean, atol=1e-5)
    for to in ("timm", "transformers", "safetensors"):
        export_weights.main(["--checkpoint", path, "--to", to, "--output", str(tmp_path / to)])
        weights = tmp_path / to if to != "safetensors" else tmp_path / to / "model.safetensors"
        np.testing.assert_allclose(extract(weights, pictures, tmp_path / f"{to}.npy"), mean, atol=1e-5, err_msg=to)


@torch.no_grad()
def test_a_fine_tuned_model_gives_what_its_classifier_sees(classifier, pictures, tmp_path):
    model, path = classifier
    images, _ = images_of(pictures / "val")
    ours = extract(path, pictures / "val", tmp_path / "ours.npy")
    np.testing.assert_allclose(ours, model.forward_features(images), atol=1e-5)
    for to in ("timm", "transformers"):
        export_weights.main(["--checkpoint", path, "--to", to, "--output", str(tmp_path / to)])
        np.testing.assert_allclose(extract(tmp_path / to, pictures / "val", tmp_path / f"{to}.npy"), ours, atol=1e-5)
    early = model.get_intermediate_layers(images)[1][:, 0]
    for layer in ("2", "-2"):
        output = tmp_path / f"cls{layer}.npy"
        np.testing.assert_allclose(
            extract(path, pictures / "val", output, "--pool", "cls", "--layer", layer), early, atol=1e-5
        )


def test_the_average_of_the_weights(classifier, pictures, tmp_path):
    model, path = classifier
    other = beit2.build_classifier(
        **SHAPE, num_classes=5, use_rel_pos_bias=True, use_abs_pos_emb=False, init_values=0.1
    )
    both = saved(other, tmp_path / "both.pth", model_ema=model.state_dict())
    averaged = extract(both, pictures / "val", tmp_path / "averaged.npy", "--model_ema")
    np.testing.assert_allclose(averaged, extract(path, pictures / "val", tmp_path / "plain.npy"), atol=1e-6)
    with pytest.raises(UsageError, match="has no weight average"):
        extract(path, pictures / "val", tmp_path / "no.npy", "--model_ema")


def test_what_cannot_be_extracted(pretraining, tokenizer_file, pictures, tmp_path):
    _, path = pretraining
    for name in ("there.npy", "mine.names.txt"):
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "gpt").mkdir()
    (tmp_path / "gpt/config.json").write_text('{"model_type": "beit", "architectures": ["BeitBackbone"]}')
    torch.save({"x": torch.zeros(1)}, tmp_path / "other.pth")
    odd = read_state_dict(path) | {"blocks.1.norm1.weight": torch.zeros(7)}
    torch.save(odd, tmp_path / "odd.pth")
    for weights, output, extra, message in (
        (path, "x.txt", [], "name a .npy or a .safetensors"),
        (path, "there.npy", [], "exists, and is not overwritten"),
        (path, "mine.npy", [], "mine.names.txt exists, and is not overwritten"),
        (path, "x.npy", ["--layer", "4"], r"--layer 4: choose a block from 1 to 3"),
        (path, "no/x.npy", [], "no/x.npy: its folder does not exist"),
        (tokenizer_file, "x.npy", [], "weights of a tokenizer, not of an encoder"),
        (tmp_path / "gpt", "x.npy", [], "a BeitBackbone; there are names for"),
        (tmp_path / "other.pth", "x.npy", [], r"other.pth: not the weights of a BEiT v2 model: there is no cls_token"),
        (tmp_path / "odd.pth", "x.npy", [], r"odd.pth: not the weights of one BEiT v2 model: .*norm1.weight"),
        (tmp_path / "nothing.pth", "x.npy", [], "no such weight file"),
    ):
        with pytest.raises(UsageError) as caught:
            extract(weights, pictures, tmp_path / output, *extra)
        assert re.search(message, caught.value.message), caught.value.message
    assert not list(tmp_path.glob("x.*"))


def test_tokens_of_pictures(tokenizer_file, pictures, tmp_path, capsys):
    named = [str(pictures / "val/red/0.jpg"), str(pictures / "val/blue/1.png")]
    figure = tmp_path / "figure.png"
    print_tokens.main(["--tokenizer_weight", str(tokenizer_file), *named, "--figure", str(figure)])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"{named[0]}: 4 x 4 tokens, ") and lines[0].endswith("different ones of 32")
    tokenizer = beit2.create_tokenizer(
        "vqkd_test_clip", weights=tokenizer_file, img_size=32, n_code=32, code_dim=8, decoder_out_dim=16
    ).eval()
    for number, name in enumerate(named):
        table = [[int(token) for token in line.split()] for line in lines[5 * number + 1 : 5 * number + 5]]
        image = CentreCrop(32, 1.0)(read_image(name)).permute(2, 0, 1)[None] / 255
        assert table == tokenizer.get_codebook_indices(image).view(4, 4).tolist()
    assert Image.open(figure).size[0] > 100
    (tmp_path / "broken.jpg").write_bytes(b"no picture")
    for words, message in (
        ([named[0], "--figure", named[1]], "1.png: exists, and is not overwritten"),
        ([named[0], "--figure", f"{tmp_path}/a.xyz"], "--figure .*a.xyz: name a picture, such as a .png"),
        ([str(pictures)], "no such picture; name files, not folders"),
    ):
        with pytest.raises(UsageError, match=message):
            print_tokens.main(["--tokenizer_weight", str(tokenizer_file), *words])
    with pytest.raises(SystemExit):
        print_tokens.main(["--tokenizer_weight", str(tokenizer_file), str(tmp_path / "broken.jpg")])
    torch.save(
        read_state_dict(tokenizer_file) | {"encoder.blocks.1.norm1.bias": torch.zeros(32)}, tmp_path / "deep.pth"
    )
    for weights, message in (("deep.pth", "2 blocks of 32 values, which no known"), ("broken.jpg", "broken.jpg")):
        with pytest.raises(UsageError, match=message):
            print_tokens.main(["--tokenizer_weight", str(tmp_path / weights), named[0]])
