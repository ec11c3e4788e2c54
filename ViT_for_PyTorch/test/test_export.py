"""convert_weight.py for other programs: timm, transformers and ONNX Runtime give our logits from what it writes."""

import json

import numpy as np
import onnxruntime
import pytest
import timm
import torch
from PIL import Image

import convert_weight
import vit
from common.errors import UsageError

NAMES = ["ant", "bee", "cat"]


def saved(folder, **changes):
    torch.manual_seed(0)
    sizes = dict(image_size=32, patch_size=16, embed_dim=48, depth=1, num_heads=4, num_classes=3)
    model = vit.AutoModel.from_config(vit.ViTConfig(**{**sizes, "mean": (0.5, 0.4, 0.3), "crop_ratio": 0.8, **changes}))
    torch.nn.init.normal_(model.head.weight, std=0.5)
    vit.save_pretrained(model, folder, NAMES)
    return model


def convert(to, source, output) -> None:
    convert_weight.main(["--to", to, "--torch_path", str(source), "--output", str(output)])


@pytest.fixture
def images():
    return torch.randn(5, 3, 32, 32)


def test_onnx_runtime_gives_the_logits_for_any_batch(tmp_path, images):
    model = saved(tmp_path / "m")
    convert("onnx", tmp_path / "m", tmp_path / "out" / "vit.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "out" / "vit.onnx", providers=["CPUExecutionProvider"])
    for batch in (images, images[:1]):
        (logits,) = session.run(["logits"], {"images": batch.numpy()})
        assert np.abs(logits - model(batch).detach().numpy()).max() < 1e-4
    kept = session.get_modelmeta().custom_metadata_map
    assert json.loads(kept["class_names"]) == NAMES and json.loads(kept["vit_config"])["mean"] == [0.5, 0.4, 0.3]


def test_transformers_reads_the_model_and_prepares_pictures_as_we_do(tmp_path, images):
    from transformers import AutoImageProcessor, ViTForImageClassification

    model = saved(tmp_path / "m", global_pool="token", fc_norm=False)
    convert("huggingface", tmp_path / "m", tmp_path / "hf")
    theirs = ViTForImageClassification.from_pretrained(tmp_path / "hf").eval()
    torch.testing.assert_close(theirs(images).logits, model(images))
    assert list(theirs.config.id2label.values()) == NAMES
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (70, 50, 3), dtype=np.uint8))
    pixels = AutoImageProcessor.from_pretrained(tmp_path / "hf")(picture, return_tensors="pt")["pixel_values"]
    ours = vit.AutoProcessor.from_pretrained(tmp_path / "m")(picture)["image"]
    assert (pixels - ours).abs().max() < 3 / 255 / 0.22, "within two grey levels: their resize rounds otherwise"
    assert vit.AutoModel.from_pretrained(tmp_path / "hf").config.crop_ratio == 0.8


def test_timm_reads_the_model(tmp_path, images):
    model = saved(tmp_path / "m")
    convert("timm", tmp_path / "m", tmp_path / "t")
    theirs = timm.create_model(f"local-dir:{tmp_path / 't'}", pretrained=True).eval()
    torch.testing.assert_close(theirs(images), model(images))


def test_what_the_other_program_has_not_is_said(tmp_path):
    saved(tmp_path / "m", reg_tokens=2)
    with pytest.raises(
        UsageError, match="Hugging Face's ViT has no global_pool=avg, fc_norm=True, reg_tokens=2: --to timm"
    ):
        convert("huggingface", tmp_path / "m", tmp_path / "hf")
    saved(tmp_path / "conv", stem="conv", patch_size=8)
    with pytest.raises(UsageError, match="no stem of the kind 'conv'"):
        convert("timm", tmp_path / "conv", tmp_path / "t")
    with pytest.raises(UsageError, match="m exists and is not overwritten"):
        convert("timm", tmp_path / "conv", tmp_path / "m")
    with pytest.raises(UsageError, match="--to onnx needs --output: a file to write"):
        convert_weight.main(["--to", "onnx", "--torch_path", str(tmp_path / "m")])
    with pytest.raises(UsageError, match="gone.pth: no such"):
        convert("timm", tmp_path / "gone.pth", tmp_path / "t")


@pytest.mark.parametrize("to", ["timm", "onnx"])
def test_an_output_below_a_file_is_one_sentence(tmp_path, to, capsys):
    saved(tmp_path / "m")
    (tmp_path / "file").write_text("kept")
    with pytest.raises(SystemExit):
        convert(to, tmp_path / "m", tmp_path / "file" / "out.onnx")
    assert capsys.readouterr().err.startswith(f"error: {tmp_path / 'file'}")
    assert (tmp_path / "file").read_text() == "kept"


@pytest.mark.parametrize(
    "to, last_step", [("timm", "vit.weights.hub_files.json.dumps"), ("onnx", "onnx.checker.check_model")]
)
def test_what_could_not_be_written_whole_is_not_there(tmp_path, monkeypatch, to, last_step):
    saved(tmp_path / "m")

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device", "out")

    monkeypatch.setattr(last_step, full)
    with pytest.raises((OSError, SystemExit)):
        convert(to, tmp_path / "m", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_a_model_that_is_not_the_files_is_told_in_one_line(tmp_path, capsys):
    saved(tmp_path / "m", depth=3)
    with pytest.raises(SystemExit):
        convert_weight.main(
            [*("--to", "timm", "--torch_path", str(tmp_path / "m"), "--output", str(tmp_path / "o")), "--model_name"]
            + ["vit_small_patch16_224"]
        )
    said = capsys.readouterr().err
    assert "does not fit" in said and said.count("the model has (") == 6 and " more. Choose" in said
