"""Both model families, with the layers that runs use, against float64 references: features, loss, gradients, an AdamW
trajectory, ranks, chunks."""

import contextlib
import json
from pathlib import Path
from types import SimpleNamespace

import clip_pretraining  # noqa: F401  mends torchvision for transformers

# isort: split
import pytest
import torch
import torch.multiprocessing as mp
from safetensors.torch import load_file
from transformers import AutoConfig, Trainer, get_linear_schedule_with_warmup

from clip_pretraining import cpu_patches
from clip_pretraining.model.layers import install
from clip_pretraining.model.loading import FAMILIES, encode_images, encode_texts
from clip_pretraining.model.loss import contrastive_loss
from clip_pretraining.training.trainer import ClipTrainer
from common.distributed import World
from common.update import GuardedStep, LossScale

GOLDEN = Path(__file__).parent / "golden"
NAMES = ("vtde_a", "clip_a", "clip_b")


def read_json(name: str) -> dict:
    return json.loads((GOLDEN / name).read_text())


def build(name: str):
    values = read_json(f"{name}_config.json")
    config = AutoConfig.for_model(**values)
    model = FAMILIES[config.model_type]._from_config(config, attn_implementation="sdpa")
    loading = model.load_state_dict(load_file(GOLDEN / f"{name}_weights.safetensors"), strict=False)
    assert not loading.missing_keys and not loading.unexpected_keys
    cpu_patches.apply(install(model), torch.device("cpu"))
    return model.eval(), load_file(GOLDEN / f"{name}_io.safetensors")


def loss_of(model, batch, rows=slice(None)) -> torch.Tensor:
    output = model(**{key: batch[key][rows] for key in ("pixel_values", "input_ids", "attention_mask")})
    return contrastive_loss(output.image_embeds, output.text_embeds, model.logit_scale)


@pytest.mark.parametrize("name", NAMES)
def test_features_loss_and_gradients(name):
    model, io = build(name)
    image = encode_images(model, io["pixel_values"])
    text = encode_texts(model, io["input_ids"], io["attention_mask"])
    torch.testing.assert_close(image.double(), io["image_embeds"], atol=2e-5, rtol=0)
    torch.testing.assert_close(text.double(), io["text_embeds"], atol=2e-5, rtol=0)
    scale = model.logit_scale.detach().exp()
    logits = scale * (image @ text.T).detach()
    torch.testing.assert_close(logits.double(), io["logits_per_image"], atol=5e-4 * float(scale) / 14, rtol=0)

    loss = loss_of(model, io)
    assert loss.item() == pytest.approx(io["loss"].item(), abs=2e-5)
    loss.backward()
    for key, norm in read_json(f"{name}_gradnorms.json").items():
        got = dict(model.named_parameters())[key].grad.norm().item()
        assert got == pytest.approx(norm, rel=1e-3) or max(got, norm) < 1e-7, key


def test_padding_to_the_longest_of_the_batch_changes_nothing():
    """What makes short batches possible: columns that are padding everywhere can go."""
    model, io = build("vtde_a")
    longest = int(io["attention_mask"].sum(1).max())
    wide = torch.nn.functional.pad(io["input_ids"][:, :longest], (0, 37 - longest), value=1)
    mask = torch.nn.functional.pad(io["attention_mask"][:, :longest], (0, 37 - longest))
    narrow = encode_texts(model, io["input_ids"][:, :longest], io["attention_mask"][:, :longest])
    torch.testing.assert_close(encode_texts(model, wide, mask), narrow, atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", NAMES)
def test_adamw_trajectory(name):
    """Six steps with the Trainer's own parameter groups, fused AdamW, clipping and linear warm-up."""
    model, io = build(name)
    want = read_json(f"{name}_adamw6.json")
    decayed = Trainer.get_decay_parameter_names(None, model)
    assert {n for n, _ in model.named_parameters()} - set(decayed) == set(want["no_decay"])
    groups = [
        {"params": [p for n, p in model.named_parameters() if (n in decayed) == decay], "weight_decay": rate}
        for decay, rate in ((True, want["weight_decay"]), (False, 0.0))
    ]
    optimizer = torch.optim.AdamW(groups, lr=want["lr"], betas=want["betas"], eps=want["eps"], fused=True)
    schedule = get_linear_schedule_with_warmup(optimizer, want["warmup_steps"], want["total_steps"])
    half = len(io["input_ids"]) // 2
    for step in range(want["total_steps"]):
        assert schedule.get_last_lr()[0] == pytest.approx(want["lrs"][step])
        loss = loss_of(model, io, torch.arange(half) * 2 + step % 2)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), want["max_grad_norm"])
        assert loss.item() == pytest.approx(want["losses"][step], rel=2e-4)
        assert norm.item() == pytest.approx(want["grad_norms"][step], rel=2e-4)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    for key, norm in want["final_param_norms"].items():
        # The true gradient of an attention key's bias is 0 (softmax ignores shifts); Adam scales its rounding noise up.
        tolerance = 2e-3 if key.endswith(("k_proj.bias", "key.bias")) else 1e-4
        assert dict(model.named_parameters())[key].norm().item() == pytest.approx(norm, rel=tolerance), key


def train_one_rank(rank: int, world: int, names: tuple[str, ...], folder: str) -> None:
    """DDP on this rank's rows; rank 0 keeps the averaged gradients."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world)
    for name in names:
        model, io = build(name)
        share = len(io["input_ids"]) // world
        rows = slice(rank * share, (rank + 1) * share)
        wrapped = torch.nn.parallel.DistributedDataParallel(model)
        wrapped.logit_scale = model.logit_scale
        loss = loss_of(wrapped, io, rows)
        loss.backward()
        if rank == 0:
            grads = {key: p.grad for key, p in model.named_parameters()}
            torch.save({"loss": loss.item(), "grads": grads}, f"{folder}/{name}.pt")
    # The group ends with the process: as the last reference, a DDP module can wait for gloo's threads for ever.


@pytest.mark.parametrize("world, names", [(2, ("vtde_a", "clip_a", "clip_b")), (4, ("vtde_a", "clip_a"))])
def test_ranks_have_the_gradients_of_one(world, names, tmp_path):
    """clip_b's batch of six is not shared by four."""
    mp.start_processes(train_one_rank, (world, names, str(tmp_path)), nprocs=world, start_method="fork")
    for name in names:
        got = torch.load(tmp_path / f"{name}.pt", weights_only=True)
        check_global_gradients(name, got["loss"], got["grads"])


def check_global_gradients(name: str, loss: float, grads: dict[str, torch.Tensor]) -> None:
    """Against the large batch's gradients, and not the per-rank ones the reference trains with."""
    dist, want = read_json(f"{name}_dist.json"), load_file(GOLDEN / f"{name}_dist_grads.safetensors")
    assert loss == pytest.approx(dist["global_loss"], abs=2e-5)
    error = sum((grads[k.removeprefix("grad.")] - w).pow(2).sum() for k, w in want.items()).sqrt().item()
    size = sum(w.pow(2).sum() for w in want.values()).sqrt().item()
    assert error / size < 1e-4 < dist["hf_ddp_grad_rel_err_vs_global_W2"]
    assert grads["logit_scale"].item() == pytest.approx(want["grad.logit_scale"].item(), rel=1e-3)


class OneProcessAccelerator:
    """The two methods of accelerate's Accelerator that a step uses."""

    @staticmethod
    def backward(loss: torch.Tensor) -> None:
        loss.backward()

    @staticmethod
    def no_sync(model) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext()


def chunk_trainer(model, micro: int) -> ClipTrainer:
    trainer = object.__new__(ClipTrainer)
    trainer.args = SimpleNamespace(
        micro_batch_size=micro, seed=3, device=torch.device("cpu"), contrastive_scope="global", loss="contrastive"
    )
    trainer.state = SimpleNamespace(global_step=5)
    trainer.world = World()
    trainer.model, trainer.accelerator = model, OneProcessAccelerator()
    trainer.optimizer = SimpleNamespace(guard=GuardedStep(None, model.parameters(), LossScale(False)))
    trainer._mean, trainer._std = torch.zeros(3), torch.full((3,), 1 / 255)
    return trainer


@pytest.mark.parametrize("name", ["vtde_a", "clip_b"])
def test_chunks_have_the_gradients_of_the_large_batch(name):
    model, io = build(name)
    inputs = {key: io[key] for key in ("pixel_values", "input_ids", "attention_mask")}
    trainer = chunk_trainer(model, micro=2)
    model.train = lambda mode=True: model  # no dropout: the large batch draws it in another order
    loss = trainer.training_step(model, inputs)
    got = {key: p.grad.clone() for key, p in model.named_parameters()}
    check_global_gradients(name, loss.item(), got)


def test_chunks_replay_their_dropout():
    """With dropout the second pass must see the features of the first: a finite difference of the loss agrees."""
    model, io = build("vtde_a")
    model.double()
    inputs = {key: io[key] for key in ("pixel_values", "input_ids", "attention_mask")}
    trainer = chunk_trainer(model, micro=4)
    trainer._prepare_inputs = lambda chunk: {**chunk, "pixel_values": chunk["pixel_values"].double()}
    trainer._features = lambda *a: tuple(f.double() for f in ClipTrainer._features(trainer, *a))
    weight = model.text_model.encoder.layer[0].intermediate.dense.weight
    trainer.training_step(model, inputs)
    assert model.training
    direction = torch.randn_like(weight, generator=torch.Generator().manual_seed(0))
    slope = (weight.grad * direction).sum().item()
    losses = []
    for sign in (1, -1):
        with torch.no_grad():
            weight += sign * 1e-3 * direction
        losses.append(trainer.training_step(model, inputs).item())
        with torch.no_grad():
            weight -= sign * 1e-3 * direction
    assert (losses[0] - losses[1]) / 2e-3 == pytest.approx(slope, rel=2e-3)
