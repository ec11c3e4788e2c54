"""fp8 linears: the formula, the gradients, what is refused, and a training that stays beside bf16's."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from common import device as devices
from common.errors import UsageError
from common.model.fp8 import Fp8Linear, linear, use_fp8

CPU = torch.device("cpu")


def rounded(value, dtype):
    """The nearest values of an 8-bit format, scaled so that the largest is the format's."""
    scale = value.abs().max() / torch.finfo(dtype).max
    return (value / scale).to(dtype).float() * scale


def close(ours, theirs):
    torch.testing.assert_close(ours.float(), theirs, rtol=2**-7, atol=1e-3)  # bf16's


@pytest.mark.parametrize("rows", [32, 21])  # products want multiples of 16: rows of zeros do not change a sum
def test_values_and_gradients_are_those_of_the_rounded_tensors(rows):
    torch.manual_seed(0)
    x = torch.randn(rows, 48, requires_grad=True)
    layer = nn.Linear(48, 32)
    grad = torch.randn(1, rows, 32).bfloat16()
    x8, w8, g8 = (
        rounded(value, dtype)
        for value, dtype in (
            (x.detach(), torch.float8_e4m3fn),
            (layer.weight.detach(), torch.float8_e4m3fn),
            (grad[0].float(), torch.float8_e5m2),
        )
    )
    use_fp8(CPU, "bf16", "--fp8", [nn.Sequential(layer)])
    assert type(layer) is Fp8Linear
    with devices.autocast(CPU, "bf16"):
        out = layer(x[None])
    assert out.dtype == torch.bfloat16
    close(out[0], x8 @ w8.T + layer.bias.detach())
    out.backward(grad)
    close(x.grad, g8 @ w8)
    close(layer.weight.grad, g8.T @ x8)
    close(layer.bias.grad, grad[0].float().sum(0))
    assert (x8 - x.detach()).abs().max() > 0.01  # rounding is coarse: the test would see it left out
    x.grad = None
    linear(x, layer.weight).backward(torch.full((rows, 32), torch.inf).bfloat16())
    assert not x.grad.isfinite().any()  # a guarded step sees it


def test_what_cannot_work_is_refused(monkeypatch):
    blocks = [nn.Sequential(nn.Linear(32, 20))]
    for device, precision, message in (
        (CPU, "fp32", "--fp8: its products replace bf16's, not those of fp32; give --precision bf16"),
        (CPU, "bf16", "--fp8: layer 0 .32 to 20. needs sizes that are multiples of 16"),
        (torch.device("cuda"), "bf16", "--fp8: NVIDIA A100 has no fp8 .Ada and Hopper"),
        (torch.device("xpu"), "bf16", "--fp8: NVIDIA A100 has no fp8 that torch knows"),
    ):
        with monkeypatch.context() as patch, pytest.raises(UsageError, match=message):
            patch.setattr("torch.cuda.get_device_capability", lambda device: (8, 0))
            patch.setattr("common.model.fp8.describe", lambda device: "NVIDIA A100")
            use_fp8(device, precision, "--fp8", blocks)
    assert type(blocks[0][0]) is nn.Linear


def test_a_training_stays_beside_that_of_bf16():
    """60 steps of an MLP that learns a rule; here the losses fall fast: the last ten within a percent."""

    def train(fp8):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 16))
        if fp8:
            use_fp8(CPU, "bf16", "--fp8", [model])
        optimizer, losses = torch.optim.AdamW(model.parameters(), lr=3e-3), []
        for _ in range(60):
            x = torch.randn(64, 16)
            with devices.autocast(CPU, "bf16"):
                logits = model(x)
            loss = F.cross_entropy(logits.float(), x.argmax(1))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        return losses

    ours, theirs = train(True), train(False)
    assert theirs[-1] < 0.6 * theirs[0] and ours != theirs
    assert sum(ours[-10:]) == pytest.approx(sum(theirs[-10:]), rel=0.01)
