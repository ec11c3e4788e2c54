#!/usr/bin/env python3
"""One ViT fine-tuning step, ours against plain timm and plain transformers: CPU seconds per picture at one thread.

    python ci/peers/vit_step.py [--precision fp32 bf16] [--rounds 5] [--batch_size 8]

Each side mixes the batch, runs forward, loss and backward, and steps AdamW; the same batch size, precision and (ours,
timm) layer decay and drop path. Plain timm: `create_model`, `Mixup`, `SoftTargetCrossEntropy`, `create_optimizer_v2`.
"""
# ruff: noqa: I001

import argparse
import dataclasses
from collections.abc import Callable
from typing import Any


import vit  # noqa: F401  (before timm: repairs torchvision)
import timm
import torch
from timm.data import Mixup
from timm.loss import SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2
from torch import Tensor, nn
from transformers import ViTConfig, ViTForImageClassification

from ci.peers import paired_timing
from common import device as devices
from common.update import GuardedStep, loss_scale
from vit import cpu_patches
from vit.training import optim
from vit.training.metrics import soft_target_cross_entropy
from vit.data.augment import Augmentation
from vit.data.mixup import apply_mix, draw_mix
from vit.model.vision_transformer import create_model

CPU = torch.device("cpu")
CLASSES = 1000
TOKENS, DIM, DEPTH = 197, 768, 12


def training_flops(batch_size: int) -> float:
    """Of the model without drop path: 2 per multiply-add, backward twice forward, no gradient for the pixels."""
    block = 2 * TOKENS * 12 * DIM**2 + 4 * TOKENS**2 * DIM
    patches, head = 2 * (TOKENS - 1) * 3 * 16**2 * DIM, 2 * DIM * CLASSES
    return batch_size * (3 * (DEPTH * block + head) + 2 * patches)


def our_step(images: Tensor, target: Tensor, precision: str) -> Callable[[], None]:
    """The parts that run_vit.py's loop calls, in its order."""
    model = create_model("vit_base_p16", CLASSES, drop_path=0.1).train()
    cpu_patches.apply(model, CPU)
    optimizer = optim.build_optimizer(model, weight_decay=0.05, layer_decay=0.65)
    update = GuardedStep(optimizer, list(model.parameters()), loss_scale(CPU, precision))
    config, steps = Augmentation(), iter(range(10**6))

    def step() -> None:
        number = next(steps)
        mix = draw_mix(config, *images.shape[2:], seed=0, step=number, rank=0)
        mixed, soft = apply_mix(images.clone(), target, mix, CLASSES, config.label_smoothing)
        devices.seeded(0, number)
        with devices.autocast(CPU, precision):
            logits = model(mixed)
        loss = soft_target_cross_entropy(logits, soft)
        loss.backward()
        optim.set_learning_rate(optimizer, 1e-6)
        update(number + 1, loss.detach())  # computes the gradient's norm; the peers do not

    return step


def peer_step(model: nn.Module, images: Tensor, target: Tensor, precision: str, **groups: Any) -> Callable[[], None]:
    """A plain step with timm's mixup, loss and optimizer factory."""
    model.train()
    optimizer = create_optimizer_v2(model, opt="adamw", lr=1e-6, weight_decay=0.05, **groups)
    mixup = Mixup(mixup_alpha=0.8, cutmix_alpha=1.0, label_smoothing=0.1, num_classes=CLASSES)
    criterion = SoftTargetCrossEntropy()

    def step() -> None:
        mixed, soft = mixup(images.clone(), target)
        with devices.autocast(CPU, precision):
            output = model(mixed)
            loss = criterion(output if isinstance(output, Tensor) else output.logits, soft)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def measure(precision: str, rounds: int, batch_size: int) -> dict[str, Any]:
    torch.manual_seed(0)
    batch = torch.randn(batch_size, 3, 224, 224), torch.randint(CLASSES, (batch_size,))
    timm_model = timm.create_model("vit_base_patch16_224", global_pool="avg", drop_path_rate=0.1)
    hf_model = ViTForImageClassification(ViTConfig(num_labels=CLASSES))
    ours = our_step(*batch, precision)
    peers = {
        "timm": peer_step(timm_model, *batch, precision, layer_decay=0.65),
        "transformers": peer_step(hf_model, *batch, precision),
    }
    peak = paired_timing.gemm_peak(torch.float32 if precision == "fp32" else torch.bfloat16)
    flops = training_flops(batch_size)
    result: dict[str, Any] = {"batch_size": batch_size, "rounds": rounds, "gemm_peak_gflops": peak / 1e9, "versus": {}}
    for name, peer in peers.items():
        ratio = paired_timing.paired(ours, peer, rounds)
        result["versus"][name] = {
            **dataclasses.asdict(ratio),
            "our_cpu_s_per_image": ratio.a_seconds / batch_size,
            "their_cpu_s_per_image": ratio.b_seconds / batch_size,
            "our_gemm_peak_share": flops / ratio.a_seconds / peak,
            "their_gemm_peak_share": flops / ratio.b_seconds / peak,
        }
        print(precision, name, result["versus"][name], flush=True)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--precision", nargs="+", choices=("fp32", "bf16"), default=["fp32", "bf16"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch_size", type=int, default=8)
    args = parser.parse_args()
    torch.set_num_threads(1)
    for precision in args.precision:
        paired_timing.write_result(f"vit_step_{precision}", measure(precision, args.rounds, args.batch_size))


if __name__ == "__main__":
    main()
