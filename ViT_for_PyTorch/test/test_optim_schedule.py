"""Layer decay, weight decay and learning rate equal MAE's; EMA follows its definition."""

import json
from pathlib import Path

import pytest
import torch

import vit
from vit.training import optim, schedule

GOLDEN = Path(__file__).parent / "golden"
TINY = dict(img_size=32, patch_size=8, embed_dim=64, depth=3, num_heads=4, num_classes=10)
MODELS = {
    "tiny_gap": lambda: vit.build_model(**TINY, global_pool="avg"),
    "tiny_cls": lambda: vit.build_model(**TINY, global_pool="token"),
    "vit_base_patch16_gap": lambda: vit.create_model("vit_base_p16"),
}


@pytest.mark.parametrize("name", MODELS)
def test_groups_equal_mae(name):
    golden = json.loads((GOLDEN / "layer_decay.json").read_text())[name]
    with torch.device("meta"):
        model = MODELS[name]()
    groups = vit.layer_decay_groups(model, golden["weight_decay"], golden["layer_decay"])
    place = {id(parameter): index for index, group in enumerate(groups) for parameter in group["params"]}
    assert len(groups) == golden["n_groups"]
    same_group = {}
    for parameter_name, parameter in model.named_parameters():
        group_number, lr_scale, weight_decay = golden["params"].pop(parameter_name)
        group = groups[place.pop(id(parameter))]
        assert group["lr_scale"] == pytest.approx(lr_scale, abs=1e-12), parameter_name
        assert group["weight_decay"] == pytest.approx(weight_decay, abs=1e-12), parameter_name
        assert same_group.setdefault(group_number, id(group)) == id(group), parameter_name
    assert not golden["params"] and not place


def test_schedule_equals_mae_at_every_iteration():
    for case in json.loads((GOLDEN / "lr_schedule.json").read_text()):
        peak = schedule.scaled_lr(case["blr"], case["batch_size"] * case["accum_iter"] * case["world_size"])
        assert peak == pytest.approx(case["abs_lr"], rel=1e-12)
        per_epoch, accumulate = case["iters_per_epoch"], case["accum_iter"]
        for index, expected in enumerate(case["lr"]):
            epoch, iteration = divmod(index, per_epoch)
            iteration -= iteration % accumulate  # MAE sets it at the first micro-batch of an update
            settings = dict(lr=peak, min_lr=case["min_lr"], warmup_epochs=case["warmup_epochs"], epochs=case["epochs"])
            assert vit.learning_rate_at(iteration / per_epoch + epoch, **settings) == pytest.approx(expected, rel=1e-12)


def test_schedule_equals_mindformers_where_warm_up_starts_at_zero():
    cases = json.loads((GOLDEN / "mf_lr_schedule.json").read_text())
    for case in [case for case in cases if case["warmup_lr_init"] == 0]:
        settings = dict(lr=case["learning_rate"], min_lr=case["lr_end"])
        settings.update(warmup_epochs=case["warmup_steps"], epochs=case["total_steps"])
        rates = [vit.learning_rate_at(step, **settings) for step in range(len(case["lr"]))]
        assert rates == pytest.approx(case["lr"], rel=1e-5)


def test_schedule_ends():
    settings = dict(lr=1.0, min_lr=0.25, epochs=4)
    assert vit.learning_rate_at(0, warmup_epochs=0, **settings) == 1.0
    assert vit.learning_rate_at(9, warmup_epochs=0, **settings) == 0.25
    assert vit.learning_rate_at(2, warmup_epochs=4, **settings) == 0.5


def test_optimizer_steps_each_layer_at_its_own_rate():
    torch.manual_seed(0)
    model = vit.build_model(**TINY)
    optimizer = optim.build_optimizer(model, weight_decay=0.0, layer_decay=0.5)
    optim.set_learning_rate(optimizer, 1e-3)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()  # the first Adam step moves every weight by its group's rate
    moved = {name: (before[name] - parameter).mean().item() for name, parameter in model.named_parameters()}
    assert moved["head.bias"] == pytest.approx(1e-3, rel=1e-3)
    assert moved["blocks.2.mlp.fc1.weight"] == pytest.approx(0.5e-3, rel=1e-3)
    assert moved["cls_token"] == pytest.approx(1e-3 * 0.5**4, rel=1e-2)


def test_ema_follows_its_definition():
    model = vit.build_model(**TINY)
    assert optim.build_ema(model, 0.0) is None
    ema = optim.build_ema(model, 0.9)
    start = model.head.weight.detach().clone()
    with torch.no_grad():
        model.head.weight.add_(1.0)
    ema.update(model)
    torch.testing.assert_close(ema.module.head.weight, 0.9 * start + 0.1 * (start + 1.0))
