"""data2vec text steps: ours and the reference's plain one, on the same weights and batch."""

from __future__ import annotations

import contextlib
import functools
import itertools
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor

from ci.peers import ROOT, data2vec_plain
from ci.peers.steps.step import Step
from common import device as devices
from common.cpu import keep_freed_memory
from common.distributed import World
from common.errors import UsageError
from data2vec import build_model, device_patches, mask_tokens
from data2vec.config import load_config
from data2vec.data.pretraining_data import TextBatch
from data2vec.training.update import Run, make_state, train_update

SIZES: dict[str, dict[str, Any]] = {
    "full": {"rows": 32, "tokens": 512, "vocab": 50265, "config": "base", "dropout": 0.1},
    "cpu": {"rows": 4, "tokens": 512, "vocab": 50265, "config": "base", "dropout": 0.1},
    "tiny": {"rows": 4, "tokens": 32, "vocab": 500, "config": "demo", "dropout": 0.0},
}
MASKING = {"mask_prob": 0.35, "mask_multiple_length": 4, "leave_unmasked_prob": 0.0, "random_token_prob": 0.0}
DTYPES = {"bf16": torch.bfloat16}


def build(size: str, device: torch.device):
    """(configuration, model, source, target); the text is random, every row full."""
    shape = SIZES[size]
    # the plain side is the released code, whose teacher sees the masked tokens only
    settings = ["task.data=none", "lr_scheduler.warmup_updates=1", "model.teacher_input=masked_only"]
    settings += [f"model.transformer.{name}={shape['dropout']}" for name in ("dropout", "attention_dropout")]
    config, _ = load_config(ROOT / "Data2vec_for_PyTorch/configs/text/pretraining", shape["config"], settings)
    devices.seed_everything(0)
    model = build_model(OmegaConf.to_container(config.model), shape["vocab"]).to(device).train()
    text = torch.randint(4, shape["vocab"] - 1, (shape["rows"], shape["tokens"]))
    made = [mask_tokens(row, 1, 1, i, mask_idx=shape["vocab"] - 1, **MASKING) for i, row in enumerate(text)]
    return config, model, *(torch.stack(column) for column in zip(*made, strict=True))


def ours(size: str, device: torch.device, precision: str, compiled: bool) -> Step:
    shape, mask_idx = SIZES[size], SIZES[size]["vocab"] - 1
    if device.type == "cpu":
        keep_freed_memory()
    config, model, source, target = build(size, device)
    device_patches.apply_to_model(model, device)
    world = World(device=device)
    state = make_state(model, config, precision, world)
    lengths = torch.full((shape["rows"],), shape["tokens"])
    plan = model.plan(source, target, mask_idx)
    batch = TextBatch(torch.arange(shape["rows"]), source, target, lengths, plan).to(device)
    if compiled:
        model.compile()

    def forward(model, batch):
        return model(batch.src_tokens, batch.target_tokens, mask_idx, batch.plan)

    run = Run(config, world, precision, forward, state)

    def step() -> Tensor:
        result = train_update(run, [batch])
        return result.loss_sum / result.sample_size

    return Step(step, source.numel(), "tokens")


def plain(size: str, device: torch.device, precision: str, compiled: bool) -> Step:
    if compiled:
        raise UsageError("the reference's data2vec step is plain functions: it is measured without torch.compile only")
    config, model, source, target = build(size, device)
    batch, mask_idx = (source.to(device), target.to(device)), SIZES[size]["vocab"] - 1
    optimizer = data2vec_plain.PlainAdam(model.parameters())
    autocast = contextlib.nullcontext
    if precision != "fp32":
        autocast = functools.partial(torch.autocast, device.type, dtype=DTYPES[precision])
    rates = itertools.chain([0.0], itertools.repeat(config.optimization.lr[0]))

    def step() -> Tensor:
        decay, clip = config.model.ema_decay, config.optimization.clip_norm
        loss, _ = data2vec_plain.step(model, optimizer, batch, mask_idx, next(rates), decay, clip, autocast)
        return torch.tensor(loss)

    return Step(step, source.numel(), "tokens")


SIDES = {"ours": ours, "plain": plain}
