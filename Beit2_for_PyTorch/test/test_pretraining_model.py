"""The masked image model against the reference: outputs, gradients, one step, initialisation, names."""

import pytest
import torch
import torch.nn.functional as F

import beit2
from beit2.model.blocks import drop_path_rates
from beit2.model.masked_image_model import masked_rows

VARIANTS = ("A_cls_shared_relshared", "D_nocls_relperlayer_abs", "E_cls_unshared_abs_nols")


def as_list(outputs):
    return outputs if isinstance(outputs, list) else [outputs]


@pytest.mark.parametrize("variant", VARIANTS)
def test_outputs_gradients_and_one_step(golden, variant):
    g = golden(f"pretrain_{variant}")
    model = beit2.build_pretraining_model(**g.json["config"])
    model.load_state_dict(g.state())
    logits = as_list(model(g["images"], g["mask"]))
    for number, values in enumerate(logits, 1):
        torch.testing.assert_close(values, g[f"logits_{number}"], rtol=1e-4, atol=1e-5)
    for number, values in enumerate(as_list(model(g["images"], g["mask"], return_all_tokens=True)), 1):
        torch.testing.assert_close(values, g[f"all_logits_{number}"], rtol=1e-4, atol=1e-5)
    for number, values in enumerate(as_list(model(g["images"][:1], return_all_tokens=True)), 1):
        torch.testing.assert_close(values, g[f"nomask_all_logits_{number}"], rtol=1e-4, atol=1e-5)

    loss = sum(F.cross_entropy(values, g["labels"]) for values in logits)
    assert loss.item() == pytest.approx(g.json["loss"], abs=1e-5)
    loss.backward()
    for name, parameter in model.named_parameters():
        if g.json["grad_norms"][name] > 1e-6:
            assert parameter.grad.norm().item() == pytest.approx(g.json["grad_norms"][name], rel=1e-4), name

    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), g.json["clip_norm"])
    assert norm.item() == pytest.approx(g.json["total_grad_norm"], rel=1e-4)
    optimizer = torch.optim.AdamW(beit2.parameter_groups(model, 0.05), lr=1.5e-3, betas=(0.9, 0.999), fused=True)
    optimizer.step()
    for name, parameter in model.named_parameters():
        after_norm, after_sum = g.json["after_step_norm_sum"][name]
        assert parameter.norm().item() == pytest.approx(after_norm, rel=1e-5, abs=1e-4), name
        assert parameter.sum().item() == pytest.approx(after_sum, abs=1e-4), name


def test_bf16_stays_close(golden):
    g = golden("pretrain_A_cls_shared_relshared")
    model = beit2.build_pretraining_model(**g.json["config"])
    model.load_state_dict(g.state())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(g["images"], g["mask"])
        loss = sum(F.cross_entropy(values.float(), g["labels"]) for values in logits)
    assert loss.item() == pytest.approx(g.json["loss"], abs=2e-2)


@pytest.mark.parametrize("early_layers", [1, 2, 3])
@pytest.mark.parametrize("head_layers", [0, 2])
@pytest.mark.parametrize("shared", [True, False])
def test_needed_rows_change_no_gradient(early_layers, head_layers, shared):
    """Last blocks on needed rows against all rows of everything, with ragged masks and a relative bias."""
    torch.manual_seed(0)
    bias = {"use_shared_rel_pos_bias": shared, "use_rel_pos_bias": not shared}
    model = beit2.build_pretraining_model(
        img_size=(32, 48), patch_size=8, embed_dim=24, depth=3, num_heads=2, vocab_size=16, init_values=0.5,
        early_layers=early_layers, head_layers=head_layers, **bias,
    )  # fmt: skip
    for name, parameter in model.named_parameters():
        if "table" in name:
            torch.nn.init.normal_(parameter)
    images = torch.randn(3, 3, 32, 48)
    mask = torch.rand(3, 24) < torch.tensor([[0.2], [0.5], [0.7]])
    labels = torch.randint(0, 16, (int(mask.sum()),))

    def gradients(outputs):
        model.zero_grad()
        sum(F.cross_entropy(values, labels) for values in outputs).backward()
        return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}

    plain = [values[mask] for values in model(images, mask, return_all_tokens=True)]
    lean = model(images, mask)
    for a, b in zip(lean, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    expected, actual = gradients(plain), gradients(lean)
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name], rtol=1e-5, atol=1e-6, msg=name)


def test_masked_patches_spare_the_search():
    torch.manual_seed(0)
    model = beit2.build_pretraining_model(img_size=32, patch_size=8, embed_dim=16, depth=2, num_heads=2, vocab_size=8)
    images, mask = torch.randn(2, 3, 32, 32), torch.zeros(2, 16, dtype=torch.bool)
    mask[0, [1, 5, 9]] = mask[1, [0, 2, 15]] = True
    rows = masked_rows(mask, 3)
    assert rows.tolist() == [[1, 5, 9], [0, 2, 15]]
    torch.testing.assert_close(model(images, mask, masked_patches=rows), model(images, mask))


def test_drop_path_rates(golden):
    (rates,) = golden("drop_path_rates").json.values()
    assert drop_path_rates(0.1, 12) == pytest.approx(rates["blocks"])
    model = beit2.create_model("beit_base_patch16_224_8k_vocab_cls_pt", drop_path_rate=0.1, vocab_size=8)
    assert [block.drop_prob for block in model.cls_pt_layers] == pytest.approx(rates["cls_pt_layers"])


def test_base_model_names_groups_and_initial_statistics(golden):
    model = beit2.create_model("beit_base_patch16_224_8k_vocab_cls_pt")
    names = golden("state_dict_keys").json["beit_base_patch16_224_8k_vocab_cls_pt"]
    found = {name: [list(tensor.shape), str(tensor.dtype)] for name, tensor in model.state_dict().items()}
    assert list(found.items()) == list(names.items())

    by_id = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = beit2.parameter_groups(model, 0.05)
    for group, expected in zip(groups, golden("param_groups").json["pretrain_base_cls_pt"], strict=True):
        assert [by_id[id(parameter)] for parameter in group["params"]] == expected["params"]
        assert (group["weight_decay"], group["lr_scale"]) == (expected["weight_decay"], expected["lr_scale"])

    statistics = golden("init_stats_beit_base_cls_pt").json["params"]
    for name, parameter in model.named_parameters():
        _, mean, std, largest = statistics[name]
        count = parameter.numel()
        error = 5 * std / count**0.5 + 1e-7
        assert parameter.mean().item() == pytest.approx(mean, abs=2 * error), name
        assert parameter.std().item() == pytest.approx(std, abs=2 * error), name
        assert parameter.abs().max().item() == pytest.approx(largest, rel=0.05, abs=1e-6), name


@pytest.mark.parametrize(
    ("name", "millions"),
    [
        ("beit_base_patch16_224_8k_vocab", 91.966),
        ("beit_base_patch16_192_8k_vocab", None),
        ("beit_base_patch16_256_8k_vocab", None),
        ("beit_24x544_patch16_224_8k_vocab_cls_pt", 97.427),
        ("beit_24x544_patch16_224_8k_vocab", None),
        ("beit_large_patch16_224_8k_vocab_cls_pt", 336.729),
        ("beit_large_patch16_224_8k_vocab", None),
        ("beit_huge_patch14_224_8k_vocab", None),
        ("beit_huge_5B_cls_pt", 4672.0),
        ("beit_tiny_patch16_224_8k_vocab_cls_pt", None),
        ("beit_small_patch16_224_8k_vocab", None),
    ],
)
def test_every_name_builds_on_the_meta_device(name, millions):
    with torch.device("meta"):
        model = beit2.create_model(name)
    assert all(parameter.is_meta for parameter in model.parameters())
    if millions is not None:
        count = sum(parameter.numel() for parameter in model.parameters()) / 1e6
        assert count == pytest.approx(millions, rel=2e-3 if "5B" in name else 1e-5)


def test_head_can_be_initialised_like_the_rest():
    config = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 2, "vocab_size": 8}
    quirk = beit2.build_pretraining_model(early_layers=1, **config)
    mended = beit2.build_pretraining_model(early_layers=1, init_cls_pt_layers=True, **config)
    assert quirk.cls_pt_layers[0].mlp.fc1.bias.abs().max() > 0
    assert mended.cls_pt_layers[0].mlp.fc1.bias.abs().max() == 0
    assert mended.cls_pt_layers[0].attn.qkv.weight.std().item() == pytest.approx(0.0108, rel=0.05)


def test_wrong_shapes_are_named():
    model = beit2.build_pretraining_model(img_size=32, patch_size=8, embed_dim=16, depth=2, num_heads=2, vocab_size=8)
    with pytest.raises(ValueError, match="16 patches"):
        model(torch.zeros(2, 3, 32, 32), torch.zeros(2, 9, dtype=torch.bool))
    with pytest.raises(ValueError, match="early_layers 5"):
        beit2.build_pretraining_model(depth=2, early_layers=5)
