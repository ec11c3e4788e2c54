"""The guarded step: unscaling, clipping, skipping and stopping without a word to the optimizer's kernel."""

import copy

import pytest
import torch
from torch import nn

from common.errors import UsageError
from common.update import MAX_SKIPPED, GuardedStep, LossScale, NonFiniteStep, loss_scale

CPU = torch.device("cpu")
OPTIMIZERS = {
    "fused": lambda p: torch.optim.AdamW(p, lr=0.1, fused=True),
    "plain": lambda p: torch.optim.AdamW(p, lr=0.1, foreach=False),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
}


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(4, 3)


def gradients(net: nn.Module, step: GuardedStep, factor: float = 1.0) -> torch.Tensor:
    loss = net(torch.arange(8.0).view(2, 4)).square().mean() * factor  # []
    step.scaled(loss).backward()
    return loss.detach()


def overflow(net: nn.Module, step: GuardedStep) -> torch.Tensor:
    gradients(net, step, factor=float("inf"))
    return torch.ones(())  # the loss itself is finite: a scaled gradient is not


def state_of(net: nn.Module, optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    moments = [v for entry in optimizer.state.values() for v in entry.values() if isinstance(v, torch.Tensor)]
    return copy.deepcopy([*net.parameters(), *moments])


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_scaling_and_clipping_give_the_update_of_the_plain_formula(name):
    ours, plain = model(), model()
    optimizer = OPTIMIZERS[name](ours.parameters())
    step = GuardedStep(optimizer, ours.parameters(), LossScale(True, 1024.0), clip_norm=0.5)
    reference = OPTIMIZERS[name](plain.parameters())
    for number in range(1, 4):
        norm, applied = step(number, gradients(ours, step))
        plain(torch.arange(8.0).view(2, 4)).square().mean().backward()
        expected = nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
        reference.step()
        reference.zero_grad()
        assert applied and torch.allclose(norm, expected, rtol=1e-6)
        for a, b in zip(ours.parameters(), plain.parameters(), strict=True):
            assert torch.allclose(a, b, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_overflow_in_fp16_changes_nothing_but_the_scale(name):
    net = model()
    optimizer, followed = OPTIMIZERS[name](net.parameters()), []
    step = GuardedStep(optimizer, net.parameters(), LossScale(True, 2.0**10), after=lambda: followed.append(1))
    step(1, gradients(net, step))
    before = state_of(net, optimizer)
    _, applied = step(2, overflow(net, step))
    assert not applied and step.scale.scale == 2.0**9 and followed == [1]
    assert all(torch.equal(a, b) for a, b in zip(before, state_of(net, optimizer), strict=True))
    assert all(p.grad is None for p in net.parameters())
    step.check()  # a skipped step is no reason to stop
    for number in range(3, 3 + MAX_SKIPPED - 2):
        step(number, overflow(net, step))
    with pytest.raises(NonFiniteStep, match="50 steps in a row without an update.*bf16"):
        step(99, overflow(net, step))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_bad_gradient_in_fp32_is_not_applied_and_names_step_and_samples(name):
    net = model()
    optimizer = OPTIMIZERS[name](net.parameters())
    step = GuardedStep(optimizer, net.parameters(), LossScale(False), remedy="Lower lr.")
    step(1, gradients(net, step))
    before = state_of(net, optimizer)
    step.remember(2, ["cat.png", "dog.png"])
    with pytest.raises(
        NonFiniteStep, match=r"the loss became inf or nan at step 2 on rank 0 \(samples cat.png, dog"
    ) as e:
        step(2, gradients(net, step, factor=float("nan")))
    assert "was not applied" in str(e.value) and "Lower lr." in str(e.value)
    assert e.value.replay == {"step": 2, "ranks": {"0": ["cat.png", "dog.png"]}, "world_size": 1, "place": {}}
    assert all(torch.equal(a, b) for a, b in zip(before, state_of(net, optimizer), strict=True))


def test_gradients_that_sum_over_samples_are_divided():
    ours, plain = model(), model()
    step = GuardedStep(OPTIMIZERS["plain"](ours.parameters()), ours.parameters(), LossScale(False))
    reference = OPTIMIZERS["plain"](plain.parameters())
    (step.scaled(ours(torch.ones(6, 4)).square().sum())).backward()
    norm, _ = step(1, torch.tensor(1.0), divisor=torch.tensor(18.0))
    plain(torch.ones(6, 4)).square().mean().backward()
    assert torch.allclose(norm, nn.utils.get_total_norm([p.grad for p in plain.parameters()]), rtol=1e-6)
    reference.step()
    assert all(torch.allclose(a, b) for a, b in zip(ours.parameters(), plain.parameters(), strict=True))


def test_the_scale_follows_torchs_rules_and_survives_a_checkpoint():
    ours, torchs = LossScale(True, 8.0, growth_interval=3), torch.amp.GradScaler("cpu", 8.0, growth_interval=3)
    tensor = torch.ones(1, requires_grad=True)
    optimizer = torch.optim.SGD([tensor], lr=0.0)
    for finite in (True, True, True, False, True, False, True, True, True, True):
        torchs.scale(tensor.sum() * (1.0 if finite else float("inf"))).backward()
        torchs.step(optimizer)
        torchs.update()
        optimizer.zero_grad()
        ours.update(finite)
        assert ours.scale == torchs.get_scale()
    resumed = LossScale(True)
    resumed.load_state_dict(torchs.state_dict())  # checkpoints of earlier versions hold GradScaler's state
    assert (resumed.scale, resumed.finite_steps) == (ours.scale, ours.finite_steps)
    constant = loss_scale(CPU, "fp16", "128")
    constant.load_state_dict(torchs.state_dict())
    constant.update(False)
    assert constant.scale == 128.0 and loss_scale(CPU, "bf16", 128).scale == 1.0


@pytest.mark.parametrize("setting", ["0", "-2", "nan", "inf", "much"])
def test_a_scale_that_cannot_be_is_refused(setting):
    with pytest.raises(UsageError, match="loss scale"):
        loss_scale(CPU, "fp16", setting)
