"""Forward, backward, updates and schedules equal fairseq's."""

import json

import numpy as np
import pytest
import torch

from common.update import GuardedStep
from data2vec import FairseqAdam, build_model, cosine_lr, ema_decay_at, ema_step
from data2vec.model.text_model import plan_batch
from data2vec.training.loss_scaler import LossScaler

VOCAB, MASK = 169, 168
VARIANTS = ("base", "mse", "innorm", "bnorm", "emaall")


def load_golden(golden, variant):
    return np.load(golden / f"model_{variant}.npz")


def part(data, prefix):
    return {key.removeprefix(prefix): torch.from_numpy(data[key]) for key in data.files if key.startswith(prefix)}


def make_model(golden, model_info, variant, **changes):
    model = build_model({**model_info[variant]["cfg_model"], **changes}, VOCAB)
    weights = "base" if variant in ("mse", "innorm") else variant  # which begin from the same ones
    model.load_state_dict(part(load_golden(golden, weights), "init/"))
    return model


def check_step(model, data, name):
    expected = part(data, f"{name}/")
    out = model(expected["src_tokens"], expected["target_tokens"], MASK)
    out["loss_sum"].backward()
    torch.testing.assert_close(out["pred"], expected["pred"], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(out["target"], expected["target_masked"], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(out["loss_sum"], expected["loss_sum"], rtol=1e-5, atol=0)
    assert out["sample_size"] == expected["sample_size"]
    norms = part(data, f"{name}/gradnorm/")
    gradients = {key: p.grad for key, p in model.named_parameters()}
    assert norms.keys() == gradients.keys()
    for key, norm in norms.items():
        torch.testing.assert_close(gradients[key].norm(), norm, rtol=1e-3, atol=1e-5, msg=lambda m, k=key: f"{k}: {m}")
    total = torch.nn.utils.get_total_norm(list(gradients.values()))
    if f"{name}/gradnorm_total" in data.files:
        torch.testing.assert_close(total, torch.from_numpy(data[f"{name}/gradnorm_total"]), rtol=1e-3, atol=0)


@pytest.mark.parametrize("variant", VARIANTS)
def test_forward_and_gradients(golden, model_info, variant):
    check_step(make_model(golden, model_info, variant), load_golden(golden, variant), "fwd_upstream")


def test_full_teacher(golden, model_info):
    data = load_golden(golden, "base")
    model = make_model(golden, model_info, "base", teacher_input="full")
    # the mode needs the masked tokens' ids only: the others it takes from the source
    expected = part(data, "fwd_fullteacher/")
    upstream = part(data, "fwd_upstream/")
    assert torch.equal(expected["src_tokens"], upstream["src_tokens"])
    out = model(expected["src_tokens"], upstream["target_tokens"], MASK)
    torch.testing.assert_close(out["target"], expected["target_masked"], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(out["loss_sum"], expected["loss_sum"], rtol=1e-5, atol=0)
    # a target that holds all original tokens says the same in the other mode
    model = make_model(golden, model_info, "base")
    out = model(expected["src_tokens"], expected["target_tokens"], MASK)
    torch.testing.assert_close(out["loss_sum"], expected["loss_sum"], rtol=1e-5, atol=0)


def state_norm(tensors):
    return float(torch.linalg.vector_norm(torch.stack([t.detach().double().norm() for t in tensors])))


@pytest.mark.parametrize("variant", VARIANTS)
def test_three_updates(golden, model_info, variant):
    data, info = load_golden(golden, variant), model_info[variant]
    model = make_model(golden, model_info, variant)
    config, schedule = info["cfg_model"], info["sched"]
    optimizer = FairseqAdam(model.parameters(), lr=0.0, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.01)
    clip_norm = info["optim"]["clip_norm"]
    guarded = GuardedStep(optimizer, list(model.parameters()), LossScaler(False), clip_norm=clip_norm)
    for step, expected in enumerate(info["steps"][:3]):
        decay = ema_decay_at(step, config["ema_decay"], config["ema_end_decay"], config["ema_anneal_end_step"])
        assert decay * 1000 == pytest.approx(expected["ema_decay"], abs=1e-9)
        ema_step(model, decay)
        if step == 2 and variant == "base":
            for key, value in part(data, "after3/ema_lagged/").items():
                lagged = model.state_dict()["encoder._ema"][key]
                torch.testing.assert_close(lagged, value, rtol=1e-4, atol=1e-5)
        batch = part(data, f"batch{step}/")
        out = model(batch["src_tokens"], batch["target_tokens"], MASK)
        out["loss_sum"].backward()
        lr = cosine_lr(step, 0.002, schedule["max_update"], schedule["warmup_updates"])
        assert lr == pytest.approx(expected["lr_used"], rel=1e-12)
        optimizer.param_groups[0]["lr"] = lr
        norm = guarded(step + 1, out["loss_sum"], divisor=torch.tensor(float(out["sample_size"]))).norm
        assert out["loss_sum"].item() == pytest.approx(expected["loss_sum"], rel=1e-5)
        assert float(norm) == pytest.approx(expected["gnorm"], rel=1e-4)
        assert state_norm(model.parameters()) == pytest.approx(expected["student_norm"], rel=1e-5)
    assert optimizer.param_groups[0]["eps"] == 1e-6
    momenta = [optimizer.state[p] for p in model.parameters()]
    assert state_norm([s["exp_avg"] for s in momenta]) == pytest.approx(
        float(data["after3/adam_exp_avg_norm"]), rel=1e-4
    )
    state = model.state_dict()
    for key, value in part(data, "after3/student/").items():
        torch.testing.assert_close(state[key], value, rtol=1e-4, atol=1e-5)
    ema_step(model, ema_decay_at(3, config["ema_decay"], config["ema_end_decay"], config["ema_anneal_end_step"]))
    for key, value in part(data, "after3/ema_stepped/").items():
        torch.testing.assert_close(model.state_dict()["encoder._ema"][key], value, rtol=1e-4, atol=1e-5)


def test_schedules(golden):
    schedules = json.loads((golden / "schedules.json").read_text())
    for key, values in schedules["ema"].items():
        start, end, steps = key.split("_")
        for step, expected in values:
            assert ema_decay_at(step, float(start), float(end), int(steps)) == pytest.approx(expected, rel=1e-12)
    for key, values in schedules["cosine"].items():
        options = json.loads(key)
        options["warmup_updates"] = options.pop("warmup")
        for step, expected in values:
            assert cosine_lr(step, **options) == pytest.approx(expected, rel=1e-12, abs=1e-300)


def test_state_has_the_reference_names(golden, model_info):
    keys = json.loads((golden / "checkpoint_keys.json").read_text())["model"]
    model = make_model(golden, model_info, "base")
    assert list(model.state_dict()) == keys[:-1]
    ema_step(model, 0.999)
    assert list(model.state_dict()) == keys
    assert list(model.state_dict()["encoder._ema"])[:2] == ["version", "embed_tokens.weight"]


def test_teacher_travels_with_the_state(golden, model_info):
    model = make_model(golden, model_info, "base")
    ema_step(model, 0.9)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 1
    ema_step(model, 0.9)
    other = build_model(model_info["base"]["cfg_model"], VOCAB)
    other.load_state_dict(model.state_dict())
    for key, value in model.state_dict()["encoder._ema"].items():
        assert torch.equal(other.state_dict()["encoder._ema"][key], value)
    ours = dict(model.named_parameters())["encoder.sentence_encoder.fc1.weight".replace("fc1", "layers.0.fc1")]
    assert not torch.equal(ours, model.state_dict()["encoder._ema"]["layers.0.fc1.weight"])
    embedding = model.encoder.sentence_encoder.embed_tokens.weight
    assert torch.equal(embedding, model.state_dict()["encoder._ema"]["embed_tokens.weight"])
    assert not any("teacher" in name for name, _ in model.named_parameters())


def test_teacher_mode_is_always_eval(golden, model_info):
    changes = {"transformer": {**model_info["base"]["cfg_model"]["transformer"], "dropout": 0.5}}
    model = make_model(golden, model_info, "base", **changes).train()
    batch = part(load_golden(golden, "base"), "batch0/")
    first, second = (model(batch["src_tokens"], batch["target_tokens"], MASK) for _ in range(2))
    assert torch.equal(first["target"], second["target"])
    assert not torch.equal(first["pred"], second["pred"])


@pytest.mark.parametrize("teacher_input", ["masked_only", "full"])
def test_rows_without_masks_and_without_any(golden, model_info, teacher_input):
    """A row that has no masked token must leave no NaN, and a batch without any gives a loss of 0."""
    data = part(load_golden(golden, "base"), "batch0/")
    model = make_model(golden, model_info, "base", teacher_input=teacher_input)
    source, target = data["src_tokens"].clone(), data["target_tokens"].clone()
    source[0] = torch.where(source[0] == MASK, target[0], source[0])
    target[0] = 1
    out = model(source, target, MASK)
    out["loss_sum"].backward()
    assert torch.isfinite(out["loss_sum"]) and all(torch.isfinite(p.grad).all() for p in model.parameters())
    source = torch.where(source == MASK, target, source)
    out = model(source, torch.ones_like(target), MASK)
    assert out["sample_size"] == 0 and float(out["loss_sum"]) == 0


def test_left_unmasked_tokens_are_teacher_input_but_no_targets():
    source = torch.tensor([[0, 168, 7, 8, 2]])  # 7 was left unmasked
    target = torch.tensor([[1, 6, 7, 1, 1]])
    plan = plan_batch(source, target, 168)
    assert plan.rows.flat.tolist() == [1]
    assert plan.teacher_tokens.tolist() == [[6, 7]]
    assert plan.teacher_rows.flat.tolist() == [0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"average_top_k_layers": 9}, "average_top_k_layers=9"),
        ({"teacher_input": "half"}, "masked_only, full"),
        ({"transformer": {"activation_fn": "relu"}}, "activation_fn"),
        ({"transformer": {"encoder": {"normalize_before": True}}}, "normalize_before"),
        ({"transformer": {"encoder": {"embed_dim": 30, "attention_heads": 4}}}, "no multiple"),
    ],
)
def test_unsupported_options_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        build_model({"average_top_k_layers": 2, "transformer": {"encoder": {"layers": 4}}, **changes}, VOCAB)


def test_adam_is_not_torch_adamw(golden, model_info):
    """The eps correction matters: without it the third update is far off."""
    torch.manual_seed(0)
    start = torch.randn(40)
    ours, torchs = start.clone().requires_grad_(), start.clone().requires_grad_()
    optimizers = [
        FairseqAdam([ours], lr=1e-2, betas=(0.9, 0.98), eps=1e-2, weight_decay=0.01),
        torch.optim.AdamW([torchs], lr=1e-2, betas=(0.9, 0.98), eps=1e-2, weight_decay=0.01),
    ]
    plain, m, v = start.double(), torch.zeros(40).double(), torch.zeros(40).double()
    for t in range(1, 4):
        gradient = torch.sin(start * t) * 0.01
        ours.grad, torchs.grad = gradient.clone(), gradient.clone()
        for optimizer in optimizers:
            optimizer.step()
        m = 0.9 * m + 0.1 * gradient
        v = 0.98 * v + 0.02 * gradient**2
        plain = plain - 0.01 * 1e-2 * plain
        plain = plain - 1e-2 * (1 - 0.98**t) ** 0.5 / (1 - 0.9**t) * m / (v.sqrt() + 1e-2)
    torch.testing.assert_close(ours.detach().double(), plain, rtol=1e-6, atol=1e-7)
    assert (torchs.detach() - plain).abs().max() > 1e-3


def test_activation_checkpointing_changes_memory_and_no_number(golden, model_info):
    """With dropout, and with the CPU's kernels: the same loss and gradients, fewer bytes kept for backward."""
    from data2vec import cpu_patches

    batch = part(load_golden(golden, "base"), "batch0/")
    found = {}
    for on in (False, True):
        config = dict(model_info["base"]["cfg_model"])
        config["transformer"] = {**config["transformer"], "dropout": 0.1, "attention_dropout": 0.1}
        config["transformer"]["checkpoint_activations"] = on
        torch.manual_seed(0)
        model = build_model(config, MASK + 1)
        cpu_patches.apply_to_model(model, torch.device("cpu"))
        model.encoder.make_teacher()
        kept = []
        torch.manual_seed(1)
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.append(t.nbytes) or t, lambda t: t):
            out = model(batch["src_tokens"], batch["target_tokens"], MASK)
        out["loss_sum"].backward()
        found[on] = out["loss_sum"], [p.grad for p in model.parameters()], sum(kept)
    assert torch.equal(found[True][0], found[False][0])
    assert all(torch.equal(a, b) for a, b in zip(found[True][1], found[False][1], strict=True))
    assert found[True][2] < 0.5 * found[False][2]
