"""The model computes what MAE's computes: logits, features, loss and gradients from the same weights and pictures."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import vit
from vit.model import vision_transformer as vit_model

GOLDEN = Path(__file__).parent / "golden"
TINY = dict(img_size=32, patch_size=8, embed_dim=64, depth=3, num_heads=4, num_classes=10)


@pytest.fixture(scope="module")
def forward():
    return np.load(GOLDEN / "forward.npz")


def loaded(pool: str) -> tuple[torch.nn.Module, str]:
    model = vit.build_model(**TINY, global_pool=pool)
    kind = "gap" if pool == "avg" else "cls"
    assert vit.load_weights(model, GOLDEN / f"mf_{kind}.ckpt", head="required") == ([], [])
    return model, kind


@pytest.mark.parametrize("pool", ["avg", "token"])
def test_logits_and_features_equal_mae(forward, pool):
    model, kind = loaded(pool)
    model.eval()
    x = torch.from_numpy(forward["x"])
    with torch.no_grad():
        features = model.forward_head(model.forward_features(x), pre_logits=True)
        logits = model(x)
    torch.testing.assert_close(features, torch.from_numpy(forward[f"feat_{kind}"]), atol=5e-6, rtol=0)
    torch.testing.assert_close(logits, torch.from_numpy(forward[f"logits_{kind}"]), atol=5e-6, rtol=0)


@pytest.mark.parametrize("pool", ["avg", "token"])
def test_float64_logits_equal_mae(forward, pool):
    model, kind = loaded(pool)
    with torch.no_grad():
        logits = model.double().eval()(torch.from_numpy(forward["x"]).double())
    torch.testing.assert_close(logits, torch.from_numpy(forward[f"logits_{kind}_f64"]), atol=1e-9, rtol=0)


def test_bf16_autocast_is_near(forward):
    model, kind = loaded("avg")
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        logits = model.eval()(torch.from_numpy(forward["x"])).float()
    torch.testing.assert_close(logits, torch.from_numpy(forward[f"logits_{kind}"]), atol=5e-2, rtol=0)


def test_loss_and_gradients_equal_mae(forward):
    model, kind = loaded("avg")
    logits = model.train()(torch.from_numpy(forward["x"]))
    loss = F.cross_entropy(logits, torch.from_numpy(forward["y"]), label_smoothing=0.1)
    loss.backward()
    assert loss.item() == pytest.approx(float(forward[f"ls_loss_{kind}"]), abs=5e-6)
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    stored = [name for name in forward.files if name.startswith("grad_gap/")]
    assert len(stored) == 5
    for name in stored:
        expected = torch.from_numpy(forward[name])
        torch.testing.assert_close(gradients[name.removeprefix("grad_gap/")], expected, rtol=1e-4, atol=1e-6, msg=name)


def test_every_preset_has_its_published_size():
    millions = {}
    for name in vit_model.PRESETS:
        with torch.device("meta"):
            model = vit.create_model(name, num_classes=1000)
        millions[name] = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    assert millions["vit_base_p16"] == pytest.approx(86.57, abs=0.01)  # 86.6M in the ViT paper, table 1
    assert millions["vit_large_p16"] == pytest.approx(304.33, abs=0.01)
    assert millions["vit_huge_p14"] == pytest.approx(632.05, abs=0.01)
    assert millions["vit_small_p16"] == pytest.approx(22.05, abs=0.01)
    assert millions["vit_demo"] < 4


def test_new_model_starts_as_mae_fine_tuning_does():
    torch.manual_seed(0)
    model = vit.create_model("vit_demo", num_classes=50, drop_path=0.1)
    assert model.head.weight.std().item() == pytest.approx(vit_model.HEAD_INIT_STD, rel=0.1)
    assert model.head.bias.abs().max() == 0
    assert model.fc_norm.eps == model.blocks[0].norm1.eps == 1e-6
    rates = [getattr(block.drop_path1, "drop_prob", 0.0) for block in model.blocks]
    assert rates == pytest.approx(np.linspace(0, 0.1, len(model.blocks)).tolist())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"img_size": 30}, "image_size 30"),
        ({"num_heads": 5}, "num_heads 5"),
        ({"num_classes": 0}, "num_classes"),
        ({"global_pool": "mean"}, "'mean'"),
    ],
)
def test_impossible_sizes_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        vit.build_model(**{**TINY, **change})


def test_unknown_preset_lists_the_known_ones():
    with pytest.raises(ValueError, match="vit_base_p16"):
        vit.create_model("vit_bse_p16")


def test_unknown_name_of_the_package_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no_such_name"):
        vit.no_such_name  # noqa: B018
