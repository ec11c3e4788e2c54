"""CPU seconds of a BEiT v2 pretraining step against the reference's plain step, at one thread, by turns.

python -m ci.peers.beit2_step [--precision bf16] [--rounds 5] [--batch 4]
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import random
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch

import beit2
from beit2 import device_patches
from beit2.image_data import Batch, Normalizer
from beit2.training.optimizers import create_optimizer
from beit2.training.pretraining_loss import token_loss
from beit2.training.run import gradient_step
from ci.peers import ROOT, beit2_plain
from ci.peers.paired_timing import gemm_peak, paired, write_result
from common import device as devices
from common.update import GuardedStep, loss_scale

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def build(count: int):
    """Model (base, CLS head, drop path 0.1), tokenizer (base) and a batch of `count` pictures."""
    torch.manual_seed(0)
    model = beit2.create_model("beit_base_patch16_224_8k_vocab_cls_pt", drop_path_rate=0.1)
    tokenizer = beit2.create_tokenizer("vqkd_encoder_base_decoder_3x768x12_clip").eval()
    generator = beit2.MaskingGenerator((14, 14), 75)
    masks = [torch.from_numpy(generator(random.Random(i), np.random.default_rng(i))).bool() for i in range(count)]
    batch = Batch(torch.randint(0, 256, (count, 224, 224, 3), dtype=torch.uint8), None, torch.stack(masks))
    return model, tokenizer, batch


def ours(precision: str, count: int):
    """A step of Beit2_for_PyTorch, as a function of the step's number."""
    model, tokenizer, batch = build(count)
    tokenizer.for_encoding(None if precision == "fp32" else DTYPES[precision])
    device = torch.device("cpu")
    optimizer = create_optimizer("adamw", beit2.parameter_groups(model, 0.05), lr=1e-4, betas=(0.9, 0.999))
    device_patches.apply(model, tokenizer, device)
    guarded = GuardedStep(optimizer, model.parameters(), loss_scale(device, precision), clip_norm=3.0)
    normalizer = Normalizer((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), device)
    loss_of = functools.partial(token_loss, model, tokenizer, normalizer, precision)

    def step(number: int) -> tuple[float, float]:
        devices.seeded(0, number)
        scalars = gradient_step(model, guarded, loss_of, [batch], number + 1)
        return float(scalars["loss"]), float(scalars["grad_norm"])

    return step


def plain(precision: str, count: int):
    """A step of the reference, as a function of the step's number."""
    model, tokenizer, batch = build(count)
    tokenizer.requires_grad_(False)
    optimizer = torch.optim.AdamW(beit2.parameter_groups(model, 0.05), lr=1e-4, betas=(0.9, 0.999))
    images, visual = Normalizer((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), torch.device("cpu")).views(batch)
    autocast = contextlib.nullcontext
    if precision != "fp32":
        autocast = functools.partial(torch.autocast, "cpu", dtype=DTYPES[precision])
    run = functools.partial(beit2_plain.step, model.train(), tokenizer, optimizer)

    def step(number: int) -> tuple[float, float]:
        devices.seeded(0, number)
        return run(images, visual, batch.mask.flatten(1), autocast=autocast)

    return step


def floating_point_operations(count: int) -> float:
    """Of the plain step: multiply-adds count two, backward twice the forward; elementwise work is left out."""
    dim, tokens, heads_dim = 768, count * 197, 64 * 12
    block = 2 * tokens * 12 * dim * dim + 2 * 2 * count * 197 * 197 * heads_dim
    patches = 2 * count * 196 * dim * dim
    head = 2 * 2 * count * 75 * dim * 8192
    tokenizer = 12 * block + patches + 2 * count * 196 * (dim * dim + dim * 32 + 32 * 8192)
    return tokenizer + 3 * (14 * block + head) + 2 * patches


def peak_memory(side: str, options: argparse.Namespace) -> int:
    """MiB resident at most after two steps, in a process of its own."""
    command = [sys.executable, "-m", "ci.peers.beit2_step", "--memory_of", side, "--precision", options.precision]
    command += ["--batch", str(options.batch)]
    return int(subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.split()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--precision", choices=tuple(DTYPES), default="fp32")
    parser.add_argument("--batch", type=int, default=4, help="pictures")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--memory_of", choices=("ours", "plain"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.memory_of:
        step = {"ours": ours, "plain": plain}[options.memory_of](options.precision, options.batch)
        step(0), step(1)
        # VmHWM and not ru_maxrss: that one begins with the parent's
        status = Path("/proc/self/status").read_text()
        print(int(re.search(r"VmHWM:\s+(\d+) kB", status).group(1)) >> 10)
        return

    a, b = (side(options.precision, options.batch) for side in (ours, plain))
    first = [a(0), b(0)]
    numbers = {"a": 0, "b": 0}

    def next_step(name: str, step):
        numbers[name] += 1
        return step(numbers[name])

    sides = (functools.partial(next_step, name, step) for name, step in (("a", a), ("b", b)))
    ratio = paired(*sides, options.rounds, warmup=0)  # the first steps above have warmed both up
    peak = gemm_peak(DTYPES[options.precision])
    write_result(
        f"beit2_step_{options.precision}",
        {
            "what": "plain reference step over ours: base_cls_pt and its tokenizer, drop path 0.1, clip 3",
            "pictures": options.batch,
            "rounds": options.rounds,
            "ratio": ratio.median,
            "ratio_low": ratio.low,
            "ratio_high": ratio.high,
            "ours_cpu_s": ratio.a_seconds,
            "plain_cpu_s": ratio.b_seconds,
            "plain_share_of_gemm_peak": floating_point_operations(options.batch) / ratio.b_seconds / peak,
            "gemm_peak_gflops": peak / 1e9,
            "first_step_loss_and_norm_ours_plain": first,
            "peak_memory_mib_ours_plain": [peak_memory(side, options) for side in ("ours", "plain")],
        },
    )


if __name__ == "__main__":
    main()
