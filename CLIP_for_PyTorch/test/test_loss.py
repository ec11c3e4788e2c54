"""The pure losses against float64 references, in one process and over gloo ranks."""

import json
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from safetensors.torch import load_file

from clip_pretraining import contrastive_loss, siglip_loss

GOLDEN = Path(__file__).parent / "golden"
CASES = json.loads((GOLDEN / "loss_features.json").read_text())
FEATURES = load_file(GOLDEN / "loss_features.safetensors")


def leaves(case: str, dtype=torch.float64) -> tuple[torch.Tensor, ...]:
    image = FEATURES[f"{case}.image"].to(dtype).clone().requires_grad_()
    text = FEATURES[f"{case}.text"].to(dtype).clone().requires_grad_()
    return image, text, torch.tensor(CASES[case]["log_scale"], dtype=dtype, requires_grad=True)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype, rtol", [(torch.float64, 1e-6), (torch.float32, 1e-4)])
def test_contrastive_loss_and_its_gradients(case, dtype, rtol):
    image, text, log_scale = leaves(case, dtype)
    loss = contrastive_loss(image, text, log_scale)
    loss.backward()
    want = CASES[case]
    # below 1e-5 the float32 loss is the rounding of a softmax that is 1
    absolute = 0 if dtype is torch.float64 else 2e-6
    assert loss.item() == pytest.approx(want["clip_loss"], rel=rtol, abs=absolute)
    assert log_scale.grad.item() == pytest.approx(want["clip_grad_log_scale"], rel=10 * rtol, abs=10 * absolute)
    torch.testing.assert_close(
        image.grad.double(),
        FEATURES[f"{case}.clip_grad_image"].double(),
        rtol=rtol * 10,
        atol=1e-5 if absolute else 1e-12,
    )
    torch.testing.assert_close(
        text.grad.double(),
        FEATURES[f"{case}.clip_grad_text"].double(),
        rtol=rtol * 10,
        atol=1e-5 if absolute else 1e-12,
    )


@pytest.mark.parametrize("case", CASES)
def test_siglip_loss_and_its_gradients(case):
    image, text, log_scale = leaves(case)
    bias = torch.tensor(CASES[case]["bias"], dtype=torch.float64, requires_grad=True)
    loss = siglip_loss(image, text, log_scale, bias)
    loss.backward()
    assert loss.item() == pytest.approx(CASES[case]["siglip_loss"], rel=1e-6)
    assert log_scale.grad.item() == pytest.approx(CASES[case]["siglip_grad_log_scale"], rel=1e-6)
    assert bias.grad.item() == pytest.approx(CASES[case]["siglip_grad_bias"], rel=1e-6)
    torch.testing.assert_close(image.grad, FEATURES[f"{case}.siglip_grad_image"].double(), rtol=1e-6, atol=1e-10)
    torch.testing.assert_close(text.grad, FEATURES[f"{case}.siglip_grad_text"].double(), rtol=1e-6, atol=1e-10)


def test_a_number_is_a_scale_too():
    image, text, log_scale = leaves("c0")
    assert contrastive_loss(image, text, log_scale.item()).item() == contrastive_loss(image, text, log_scale).item()


def one_rank(rank: int, world: int, folder: str) -> None:
    """Losses of this rank's rows and the gradients DDP would average; the parent compares."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world)
    result = {}
    for case in CASES:
        image, text, log_scale = leaves(case)
        bias = torch.tensor(CASES[case]["bias"], dtype=torch.float64, requires_grad=True)
        share = len(image) // world
        rows = slice(rank * share, (rank + 1) * share)
        for name, loss in {
            "clip": contrastive_loss(image[rows], text[rows], log_scale),
            "siglip": siglip_loss(image[rows], text[rows], log_scale, bias),
            "local": contrastive_loss(image[rows], text[rows], log_scale, scope="local"),
        }.items():
            grads = torch.autograd.grad(loss, [image, text, log_scale, bias], allow_unused=True)
            result[f"{case}.{name}"] = (loss.detach(), *(g if g is not None else torch.zeros(()) for g in grads))
    torch.save(result, f"{folder}/rank{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("world", [2, 4])
def test_distributed_gradients_are_the_large_batch_ones(world, tmp_path):
    mp.start_processes(one_rank, (world, str(tmp_path)), nprocs=world, start_method="fork")
    ranks = [torch.load(tmp_path / f"rank{r}.pt", weights_only=True) for r in range(world)]
    for case, want in CASES.items():
        for name in ("clip", "siglip"):
            loss, image, text, scale, bias = (
                torch.stack(t).mean(0) for t in zip(*(r[f"{case}.{name}"] for r in ranks), strict=True)
            )
            for r in ranks:  # the reported value is the global one on every rank
                assert r[f"{case}.{name}"][0].item() == pytest.approx(want[f"{name}_loss"], rel=1e-6)
            assert loss.item() == pytest.approx(want[f"{name}_loss"], rel=1e-6)
            assert scale.item() == pytest.approx(want[f"{name}_grad_log_scale"], rel=1e-6)
            torch.testing.assert_close(image, FEATURES[f"{case}.{name}_grad_image"].double(), rtol=1e-6, atol=1e-10)
            torch.testing.assert_close(text, FEATURES[f"{case}.{name}_grad_text"].double(), rtol=1e-6, atol=1e-10)
            if name == "siglip":
                assert bias.item() == pytest.approx(want["siglip_grad_bias"], rel=1e-6)
        local = torch.stack([r[f"{case}.local"][0] for r in ranks]).mean().item()
        assert local == pytest.approx(want[f"clip_local_mean_W{world}"], rel=1e-6)
        assert local != pytest.approx(want["clip_loss"], rel=1e-2)  # what the published numbers were computed with
