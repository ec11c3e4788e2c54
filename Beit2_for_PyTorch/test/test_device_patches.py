"""What a CPU and CUDA do otherwise: the same results; put in by one call, left out by a variable."""

import copy
import types

import pytest
import torch
from timm.layers import drop_path

import beit2
from beit2 import cpu_patches, cuda_patches, device_patches
from beit2.model.blocks import Attention, Block, attend, attend_plainly

CPU = torch.device("cpu")
SHAPE = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2, "init_values": 0.5}


def test_dropped_samples_are_not_computed():
    """Same draws, same sum as timm's drop_path; and gradients exist when every sample is dropped."""
    seen = []

    def branch(x):
        seen.append(len(x))
        return 3 * x

    x = torch.randn(16, 4, 8)
    torch.manual_seed(1)
    lean = cpu_patches.add_kept_samples(x, branch, (x,), 0.5, True)
    torch.manual_seed(1)
    torch.testing.assert_close(lean, x + drop_path(3 * x, 0.5, True))
    assert seen[0] < 16
    weight = torch.ones(1, requires_grad=True)
    torch.manual_seed(0)
    cpu_patches.add_kept_samples(x, lambda y: y * weight, (x,), 1 - 1e-9, True).sum().backward()
    assert weight.grad.item() == 0


@pytest.mark.parametrize("off", ["", "plain_attention", "skip_dropped_samples,wide_products"])
def test_a_patched_model_has_the_loss_and_gradients_of_the_plain_one(monkeypatch, off):
    monkeypatch.setenv("CPU_PATCHES_OFF", off)
    config = SHAPE | {"vocab_size": 16, "early_layers": 2, "use_shared_rel_pos_bias": True, "drop_path_rate": 0.3}
    torch.manual_seed(0)
    plain, patched = (beit2.build_pretraining_model(**config).train() for _ in range(2))
    patched.load_state_dict(plain.state_dict())
    device_patches.apply(patched, None, CPU)
    kinds = {type(m): m for m in patched.modules()}
    assert (kinds[Attention].attend is attend_plainly) == ("plain_attention" not in off)
    assert (kinds[Block].add_branch is cpu_patches.add_kept_samples) == ("skip_dropped" not in off)
    images, mask = torch.randn(6, 3, 32, 32), torch.arange(16).expand(6, 16) % 3 == 0
    losses = []
    for model in (plain, patched):
        torch.manual_seed(1)  # of the dropped samples
        losses.append(sum(logits.square().mean() for logits in model(images, mask)))
        losses[-1].backward()
    torch.testing.assert_close(*losses)
    for (name, p), q in zip(plain.named_parameters(), patched.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-6, msg=name)
    monkeypatch.setenv("CPU_PATCHES_OFF", "plain")
    with pytest.raises(SystemExit, match="plain: choose from this project's patches, plain_attention"):
        device_patches.apply(plain, None, CPU)


def test_a_copy_of_a_patched_model_runs_with_its_own_weights():
    """As --model_ema makes one."""
    model = beit2.build_classifier(**SHAPE, num_classes=3, init_scale=1.0)
    device_patches.apply(model, None, CPU)
    average = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    images = torch.randn(2, 3, 32, 32)
    assert model(images).abs().sum() == 0 and average(images).abs().sum() > 0


@pytest.mark.parametrize("length", [9, 16])
def test_an_aligned_bias_changes_no_value(length):
    torch.manual_seed(0)
    q = torch.randn(2, 3, length, 8)
    bias = torch.randn(1, 3, length, length, requires_grad=True)
    results = [function(q, q, q, bias, 0.25) for function in (attend, attend_plainly, cuda_patches.attend_aligned)]
    for other in results[1:]:
        torch.testing.assert_close(results[0], other)
    model = beit2.build_classifier(**SHAPE, num_classes=3)
    cuda_patches.apply(model, None, types.SimpleNamespace(type="cuda"))
    assert all(m.attend is cuda_patches.attend_aligned for m in model.modules() if isinstance(m, Attention))
