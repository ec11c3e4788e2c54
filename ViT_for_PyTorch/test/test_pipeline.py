"""pipeline() and the Auto classes: MindFormers' golden predictions, labels that match the head, clear errors."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import vit
from vit import AutoConfig, AutoModel, ViTConfig, ViTImageProcessor, pipeline
from vit.data.image_folder import BrokenImage
from vit.weights.labels import save_class_names

GOLDEN = Path(__file__).parent / "golden"
EXPECTED = json.loads((GOLDEN / "mf_pipeline.json").read_text())
OUTPUTS = EXPECTED["outputs"]
PICTURES = [GOLDEN / "img0.png", GOLDEN / "img1.png"]


@pytest.fixture(scope="module")
def model():
    model = vit.build_model(32, 8, 64, 3, 4, 10)
    vit.load_weights(model, GOLDEN / "mf_gap.ckpt", head="required")
    return model


@pytest.fixture
def classify(model):
    processor = ViTImageProcessor(EXPECTED["image_processor_size"])
    return pipeline(
        "image_classification", model, image_processor=processor, candidate_labels=EXPECTED["labels"], device="cpu"
    )


def agree(result, expected):
    """Scores within 5e-3, and the same labels wherever the scores differ by more than 1e-2."""
    assert len(result) == len(expected)
    for ours, theirs in zip(result, expected, strict=True):
        assert [entry["score"] for entry in ours] == pytest.approx([entry["score"] for entry in theirs], abs=5e-3)
        scores = [entry["score"] for entry in theirs]
        for i, (one, two) in enumerate(zip(ours, theirs, strict=True)):
            if all(abs(scores[i] - other) > 1e-2 for j, other in enumerate(scores) if j != i):
                assert one["label"] == two["label"]


@pytest.mark.parametrize(
    "case, count, options",
    [
        ("default_top3_single_pil", 1, {}),
        ("list_of_two_pil_top_k_2", 2, {"top_k": 2}),
        ("top_k_None", 1, {"top_k": None}),
        ("top_k_100", 1, {"top_k": 100}),
        ("top_k_0", 1, {"top_k": 0}),
    ],
)
def test_predictions_are_mindformers(classify, case, count, options):
    pictures = [Image.open(path) for path in PICTURES[:count]]
    agree(classify(pictures if count > 1 else pictures[0], **options), OUTPUTS[case])


def test_batches_and_forms_agree(classify):
    pixels = np.array(Image.open(PICTURES[0]).convert("RGB")).transpose(2, 0, 1)
    one = classify(PICTURES[0])
    agree(classify(np.stack([pixels, pixels])), one * 2)
    classify.batch_size = 2
    many = classify([*PICTURES, *PICTURES, PICTURES[0]])
    assert len(many) == 5
    for result, expected in zip(many, [one[0], classify(PICTURES[1])[0]] * 2 + one, strict=True):
        agree([result], [expected])


@pytest.mark.parametrize("mode", ["L", "RGBA"])
def test_modes_that_the_reference_refuses_work(classify, mode):
    assert len(classify(Image.open(PICTURES[0]).convert(mode))[0]) == 3


def test_a_module_without_names_has_the_references_crop_and_numbered_labels(model):
    result = pipeline("image_classification", model=model, device="cpu")(PICTURES[0], top_k=1)
    label = OUTPUTS["default_top3_single_pil"][0][0]["label"]
    assert result[0][0]["label"] == f"class_{EXPECTED['labels'].index(label)}"


def test_bad_arguments_are_errors(classify, model, tmp_path):
    with pytest.raises(ValueError, match="3 class names for a head of 10"):
        pipeline("image_classification", model, candidate_labels=["a", "b", "c"])
    with pytest.raises(ValueError, match="text_generation"):
        pipeline("text_generation", model)
    with pytest.raises(ValueError, match="top_k=-1"):
        classify(PICTURES[0], top_k=-1)
    with pytest.raises(ValueError, match="empty"):
        classify([])
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8 no")
    with pytest.raises(BrokenImage, match="broken.jpg"):
        classify([PICTURES[0], tmp_path / "broken.jpg"])


@pytest.fixture
def run_folder(tmp_path):
    """What a training run on three classes leaves behind."""
    torch.manual_seed(0)
    model = vit.create_model("vit_demo", 3)
    torch.nn.init.normal_(model.head.weight)
    (tmp_path / "checkpoints").mkdir()
    torch.save({"model": model.state_dict(), "state": {"step": 7}}, tmp_path / "checkpoints" / "best.pt")
    save_class_names(tmp_path / "checkpoints", ["ant", "bee", "cat"])
    return tmp_path


def test_a_run_predicts_its_own_class_names(run_folder):
    file = run_folder / "checkpoints" / "best.pt"
    results = [pipeline(model=source, device="cpu")(PICTURES, top_k=None) for source in (run_folder, str(file))]
    assert results[0] == results[1]
    assert all({entry["label"] for entry in row} == {"ant", "bee", "cat"} for row in results[0])
    assert sum(entry["score"] for entry in results[0][0]) == pytest.approx(1)


def test_auto_classes_read_a_checkpoint(run_folder):
    config = AutoConfig.from_pretrained(run_folder)
    assert (config.embed_dim, config.depth, config.num_heads, config.num_classes) == (96, 4, 3, 3)
    model = AutoModel.from_pretrained(run_folder)
    state = torch.load(run_folder / "checkpoints" / "best.pt", weights_only=True)["model"]
    assert not model.training and all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    larger = AutoModel.from_pretrained(run_folder, AutoConfig.from_pretrained(run_folder, image_size=96))
    assert larger(torch.zeros(1, 3, 96, 96)).shape == (1, 3)


def test_auto_config_prints_the_readmes_dictionary():
    config = AutoConfig.from_pretrained("vit_base_p16")
    text = "{'patch_size': 16, 'in_chans': 3, 'embed_dim': 768, 'depth': 12, 'num_heads': 12, 'mlp_ratio': 4, "
    assert str(config).startswith(text) and str(config).endswith("'image_size': 224, 'num_classes': 1000}")
    assert config["embed_dim"] == 768 and "'batch_size': 32" in str(config)
    assert AutoConfig.from_pretrained("mindspore/vit_base_p16") == config


def test_auto_model_from_config_has_the_configured_sizes():
    config = ViTConfig(patch_size=8, embed_dim=48, depth=2, num_heads=3, image_size=24, num_classes=5)
    assert AutoModel.from_config(config)(torch.zeros(2, 3, 24, 24)).shape == (2, 5)


def test_unknown_names_fields_and_sizes_are_errors(tmp_path):
    with pytest.raises(ValueError, match="resnet50: neither a file or folder nor a known model name .*vit_base_p16"):
        AutoConfig.from_pretrained("resnet50")
    with pytest.raises(ValueError, match="unknown configuration field hidden"):
        AutoConfig.from_pretrained("vit_base_p16", hidden=3)
    with pytest.raises(ValueError, match="in_chans=4"):
        ViTConfig(in_chans=4)
    with pytest.raises(ValueError, match="mf_gap.ckpt: no known model has .* num_heads"):
        AutoModel.from_pretrained(GOLDEN / "mf_gap.ckpt")
    with pytest.raises(ValueError, match="no best.pt"):
        AutoModel.from_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(GOLDEN / "mf_gap.ckpt", num_heads=4)
    assert AutoModel.from_pretrained(GOLDEN / "mf_gap.ckpt", config).num_classes == 10


def test_pipeline_is_a_function_after_all_imports():
    import vit.api.predictor  # noqa: F401
    import vit.api.trainer  # noqa: F401

    assert callable(vit.pipeline) and callable(vit.Trainer)
