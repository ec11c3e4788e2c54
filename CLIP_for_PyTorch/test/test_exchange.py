"""convert_model.py: other programs load what it writes and get our features; what it reads comes back bit for bit."""

import io
import json
from pathlib import Path

import clip_pretraining  # noqa: F401  mends torchvision for transformers

# isort: split
import numpy as np
import pytest
import torch
from clip_sample import draw
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPConfig, CLIPModel, CLIPVisionModelWithProjection

import convert_model
import run_clip
from clip_pretraining.data.images import load_image
from clip_pretraining.data.tokenization import load_tokenizer, openai_tokenizer
from clip_pretraining.evaluation.encoder import normalise_pixels
from clip_pretraining.exchange import names, transformers_folder
from clip_pretraining.model.loading import ImageSettings, add_logit_bias, encode_images, encode_texts, load_model

CAPTIONS = ["A red box on white ground.", "a green box", "A blue box on black ground, and nothing else"]


def convert(source: Path, to: str, output: Path, *more: str) -> None:
    convert_model.main(["--model_name_or_path", str(source), "--to", to, "--output_dir", str(output), *more])


def refusal(capsys, *arguments) -> str:
    with pytest.raises(SystemExit) as refused:
        convert(*arguments)
    error = capsys.readouterr().err
    assert refused.value.code == 2 and len(error.strip().splitlines()) == 1
    return error


@pytest.fixture
def picture(tmp_path) -> Path:
    path = tmp_path / "picture.png"
    Image.open(io.BytesIO(draw(3)[0])).save(path)
    return path


def our_features(folder: Path, picture: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """[1, d] and [3, d], from the picture's file and the captions as they are typed."""
    model, settings = load_model(str(folder)).eval(), ImageSettings(32)
    mean, std = torch.tensor(settings.mean), torch.tensor(settings.std)
    pixels = normalise_pixels(load_image(picture, settings.size)[None], mean, std)
    rows = load_tokenizer(str(folder))(CAPTIONS, padding=True, return_tensors="pt")
    with torch.no_grad():
        return encode_images(model, pixels), encode_texts(model, rows["input_ids"], rows["attention_mask"])


@pytest.fixture(params=["tiny_clip", "tiny_model"])
def trained(request, tmp_path) -> Path:
    """A model folder, of CLIPModel with SigLIP's bias."""
    folder = request.getfixturevalue(request.param)
    if request.param == "tiny_model":
        return folder
    model, tokenizer = load_model(str(folder)), load_tokenizer(str(folder))
    add_logit_bias(model, -9.5)
    transformers_folder.write(model, tokenizer, ImageSettings(32), tmp_path / "with_bias")
    return tmp_path / "with_bias"


def test_open_clip_has_our_features_and_gives_the_model_back(trained, picture, tmp_path):
    """Through its own preprocessing and tokenizer."""
    open_clip = pytest.importorskip("open_clip", reason="the library itself: pip install -r requirements-dev.txt")
    convert(trained, "open_clip", tmp_path / "theirs")
    name = f"local-dir:{tmp_path / 'theirs'}"
    model, preprocess = open_clip.create_model_from_pretrained(name)
    model.eval()  # RoBERTa has dropout
    with torch.no_grad():
        image = model.encode_image(preprocess(Image.open(picture))[None], normalize=True)
        text = model.encode_text(open_clip.get_tokenizer(name)(CAPTIONS), normalize=True)
    want_image, want_text = our_features(trained, picture)
    torch.testing.assert_close(text, want_text, atol=2e-6, rtol=0)
    torch.testing.assert_close(image, want_image, atol=2e-4, rtol=0)  # a level of uint8 may be another
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        want = encode_images(load_model(str(trained)).eval(), pixels)
        torch.testing.assert_close(model.encode_image(pixels, normalize=True), want, atol=2e-6, rtol=0)
    Image.open(picture).resize((140, 128)).save(picture)  # becomes 35 x 32: their crop begins at 2, ours at 1
    settings = ImageSettings(32)
    ours = normalise_pixels(load_image(picture, 32)[None], torch.tensor(settings.mean), torch.tensor(settings.std))
    theirs = preprocess(Image.open(picture))[None]
    torch.testing.assert_close(theirs[..., :-1], ours[..., 1:], atol=1e-5, rtol=0)
    assert not torch.equal(theirs, ours)
    Image.open(io.BytesIO(draw(3)[0])).save(picture)

    convert(tmp_path / "theirs", "transformers", tmp_path / "back")
    start, back = (load_file(folder / "model.safetensors") for folder in (trained, tmp_path / "back"))
    assert start.keys() == back.keys() and all(torch.equal(start[key], back[key]) for key in start)
    again = our_features(tmp_path / "back", picture)
    assert torch.equal(again[0], want_image) and torch.equal(again[1], want_text)


def test_a_model_that_open_clip_made_trains_here(pairs_table, tmp_path):
    """With open_clip's own tokenizer, gelu, 77 positions, and weights as its training writes them."""
    open_clip = pytest.importorskip("open_clip", reason="the library itself: pip install -r requirements-dev.txt")
    vision = {"image_size": 32, "layers": 1, "width": 64, "head_width": 32, "patch_size": 8}
    config = {"embed_dim": 32, "vision_cfg": vision, "text_cfg": {"width": 64, "heads": 2, "layers": 1}}
    theirs = open_clip.CLIP(**config).eval()
    torch.save(
        {"epoch": 1, "state_dict": {f"module.{k}": v for k, v in theirs.state_dict().items()}}, tmp_path / "a.pt"
    )
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/open_clip_config.json").write_text(json.dumps({"model_cfg": config}))
    (tmp_path / "a.pt").rename(tmp_path / "folder/open_clip_pytorch_model.bin")
    convert(tmp_path / "folder", "transformers", tmp_path / "start")
    model, tokenizer = load_model(str(tmp_path / "start")).eval(), load_tokenizer(str(tmp_path / "start"))
    rows = tokenizer(CAPTIONS, padding=True, return_tensors="pt")
    with torch.no_grad():
        want = theirs.encode_text(open_clip.tokenize(CAPTIONS), normalize=True)
        got = encode_texts(model, rows["input_ids"], rows["attention_mask"])
    torch.testing.assert_close(got, want, atol=2e-6, rtol=0)
    options = [
        "--do_train",
        "--train_file",
        str(pairs_table),
        "--max_steps",
        "1",
        "--batch_size",
        "8",
        "--device",
        "cpu",
    ]
    paths = ["--model_name_or_path", str(tmp_path / "start"), "--output_dir", str(tmp_path / "out")]
    assert run_clip.main([*paths, *options])["Status"] == "OK"


def openai_like(folder: Path) -> CLIPModel:
    """As OpenAI's, of one layer: heads of 64 channels, quick_gelu, 49,408 tokens."""
    tower = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 256}
    vision = {**tower, "image_size": 32, "patch_size": 8, "projection_dim": 32}
    text = {**tower, "projection_dim": 32, "bos_token_id": 49406, "eos_token_id": 49407, "pad_token_id": 49407}
    torch.manual_seed(0)
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=32)).eval()
    transformers_folder.write(model, openai_tokenizer(), ImageSettings(32), folder)
    return model


def test_openai_s_names_both_ways(tmp_path, capsys):
    open_clip = pytest.importorskip("open_clip", reason="the library itself: pip install -r requirements-dev.txt")
    model = openai_like(tmp_path / "start")
    convert(tmp_path / "start", "openai", tmp_path / "file")
    theirs = open_clip.load_openai_model(str(tmp_path / "file/clip.pt"), precision="fp32")
    pixels, ids = torch.randn(2, 3, 32, 32), open_clip.tokenize(CAPTIONS)
    with torch.no_grad():
        rows = openai_tokenizer()(CAPTIONS, padding=True, return_tensors="pt")
        got = theirs.encode_image(pixels, normalize=True), theirs.encode_text(ids, normalize=True)
        want = encode_images(model, pixels), encode_texts(model, rows["input_ids"], rows["attention_mask"])
    for theirs_, ours in zip(got, want, strict=True):  # their program keeps matrices in fp16
        torch.testing.assert_close(theirs_, ours, atol=2e-3, rtol=0)

    assert "--activation" in refusal(capsys, tmp_path / "file/clip.pt", "transformers", tmp_path / "back")
    convert(tmp_path / "file/clip.pt", "transformers", tmp_path / "back", "--activation", "quick_gelu")
    start, back = (load_file(tmp_path / name / "model.safetensors") for name in ("start", "back"))
    assert start.keys() == back.keys() and all(torch.equal(start[key], back[key]) for key in start)


def test_onnx_towers_compute_our_features(tiny_model, picture, tmp_path):
    """Of other batches and lengths than the export saw; the folder has what prepares its inputs."""
    onnxruntime = pytest.importorskip("onnxruntime", reason="pip install -r requirements-dev.txt")
    from transformers import AutoProcessor

    convert(tiny_model, "onnx", tmp_path / "onnx")
    vision, text = (onnxruntime.InferenceSession(tmp_path / f"onnx/{name}.onnx") for name in ("vision", "text"))
    inputs = AutoProcessor.from_pretrained(tmp_path / "onnx")(
        text=CAPTIONS, images=Image.open(picture).convert("RGB"), return_tensors="np", padding=True
    )
    ids, mask = (inputs[name].astype(np.int64) for name in ("input_ids", "attention_mask"))
    got_image = vision.run(None, {"pixel_values": inputs["pixel_values"]})[0]
    got_text = text.run(None, {"input_ids": ids, "attention_mask": mask})[0]
    image, texts = our_features(tiny_model, picture)
    assert np.abs(got_text - texts.numpy()).max() < 1e-4
    assert np.abs(got_image - image.numpy()).max() < 1e-4
    told = json.loads(vision.get_modelmeta().custom_metadata_map["clip"])
    assert told["logit_scale"] == pytest.approx(load_model(str(tiny_model)).logit_scale.item())
    assert told["logit_bias"] is None and told["pictures"]["size"] == 32


def test_transformers_loads_the_vision_tower(tiny_model, tmp_path, capsys):
    convert(tiny_model, "vision", tmp_path / "vision")
    tower = CLIPVisionModelWithProjection.from_pretrained(tmp_path / "vision").eval()
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    want = encode_images(load_model(str(tiny_model)).eval(), pixels)
    got = torch.nn.functional.normalize(tower(pixel_values=pixels).image_embeds, dim=-1)
    torch.testing.assert_close(got, want, atol=1e-6, rtol=0)
    assert "not empty" in refusal(capsys, tiny_model, "vision", tmp_path / "vision")
    assert "a text tower of CLIP's" in refusal(capsys, tiny_model, "openai", tmp_path / "openai")


def test_what_is_no_model_of_ours_is_refused_in_a_sentence(tiny_clip, tmp_path, capsys):
    convert(tiny_clip, "open_clip", tmp_path / "good")
    capsys.readouterr()
    good = json.loads((tmp_path / "good/open_clip_config.json").read_text())
    weights = load_file(tmp_path / "good/open_clip_model.safetensors")

    def broken(part: str, key: str, value: object) -> str:
        content = json.loads(json.dumps(good))
        content["model_cfg"][part][key] = value
        (tmp_path / "good/open_clip_config.json").write_text(json.dumps(content))
        return refusal(capsys, tmp_path / "good", "transformers", tmp_path / "out")

    assert "vit_base" in broken("vision_cfg", "timm_model_name", "vit_base")
    assert "ls_init_value = 0.1" in broken("vision_cfg", "ls_init_value", 0.1)
    assert "pool_type = 'last'" in broken("text_cfg", "pool_type", "last")
    assert "ResNet" in broken("vision_cfg", "layers", [3, 4, 6, 3])
    assert "does not fit" in broken("vision_cfg", "patch_size", 4)
    assert "lacks transformer.resblocks.2" in broken("text_cfg", "layers", 3)
    assert "not a multiple of the number of attention heads (5)" in broken("text_cfg", "heads", 5)
    for change, told in (
        ({"preprocess_cfg": {"mean": [0.5]}}, "three numbers each"),
        ({"model_cfg": {**good["model_cfg"], "vision_cfg": [1]}}, "not a configuration"),
        ({"model_cfg": {**good["model_cfg"], "init_logit_bias": "x"}}, "could not convert"),
        ({"model_cfg": {**good["model_cfg"], "quick_gelu": "false"}}, "'false': no model of ours"),
    ):
        (tmp_path / "good/open_clip_config.json").write_text(json.dumps({**good, **change}))
        assert told in refusal(capsys, tmp_path / "good", "transformers", tmp_path / "out")
    (tmp_path / "good/open_clip_config.json").write_text('{"model_cfg": 3}')
    assert "not a configuration" in refusal(capsys, tmp_path / "good", "transformers", tmp_path / "out")
    (tmp_path / "good/open_clip_config.json").write_text(json.dumps(good))
    save_file({key: value for key, value in weights.items() if "ln_pre" not in key}, tmp_path / "less.safetensors")
    (tmp_path / "less.safetensors").rename(tmp_path / "good/open_clip_model.safetensors")
    assert "lacks visual.ln_pre" in refusal(capsys, tmp_path / "good", "transformers", tmp_path / "out")
    (tmp_path / "good/open_clip_model.safetensors").write_bytes(b"\x00" * 20)
    assert "cannot be read" in refusal(capsys, tmp_path / "good", "transformers", tmp_path / "out")
    torch.jit.script(torch.nn.Linear(1, 1)).save(str(tmp_path / "program.pt"))
    assert "TorchScript" in refusal(capsys, tmp_path / "program.pt", "transformers", tmp_path / "out")
    torch.save({"a": torch.zeros(1)}, tmp_path / "other.pt")
    options = (tmp_path / "other.pt", "transformers", tmp_path / "out", "--activation", "gelu")
    assert "not a Vision Transformer" in refusal(capsys, *options)
    openai = names.to_open_clip(openai_like(tmp_path / "openai_like"))
    capsys.readouterr()
    for key, value, told in (
        ("visual.positional_embedding", torch.zeros(15, 64), "no square picture"),
        ("visual.conv1.weight", torch.zeros(96, 3, 8, 8), "not of heads of 64 channels"),
    ):
        torch.save({**openai, key: value}, tmp_path / "other.pt")
        assert told in refusal(capsys, *options)
    with pytest.raises(SystemExit):
        load_model(str(tmp_path / "good"))
