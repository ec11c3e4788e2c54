"""CPU seconds of a data2vec text step (base, 4 x 512 tokens, dropout 0.1) against the reference's plain step.

python -m ci.peers.data2vec_step [--precision bf16] [--rounds 5] [--rows 4] [--tokens 512]

One thread each, in two processes by turns: ours sets the C library's memory behaviour, which must not help the other.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import statistics
import subprocess
import sys
import time

import torch
from omegaconf import OmegaConf

from ci.peers import ROOT, data2vec_plain
from ci.peers.paired_timing import gemm_peak, write_result
from common import device as devices
from common.cpu import keep_freed_memory
from common.distributed import World
from data2vec import build_model, cpu_patches, mask_tokens
from data2vec.config import load_config
from data2vec.data.pretraining_data import TextBatch
from data2vec.training.update import Run, make_state, train_update

VOCAB, MASK = 50265, 50264
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def build(shape: tuple[int, int], dropout: float):
    """(configuration, model, source, target) of base.yaml."""
    settings = ["task.data=none", "lr_scheduler.warmup_updates=1"]
    settings += [f"model.transformer.dropout={dropout}", f"model.transformer.attention_dropout={dropout}"]
    config, _ = load_config(ROOT / "Data2vec_for_PyTorch/configs/text/pretraining", "base", settings)
    torch.manual_seed(0)
    model = build_model(OmegaConf.to_container(config.model), VOCAB).train()
    text = torch.randint(4, VOCAB - 1, shape)
    options = {"mask_idx": MASK, "mask_prob": 0.35, "mask_multiple_length": 4}
    options |= {"leave_unmasked_prob": 0.0, "random_token_prob": 0.0}
    pairs = [mask_tokens(row, 1, 1, i, **options) for i, row in enumerate(text)]
    return config, model, *(torch.stack(column) for column in zip(*pairs, strict=True))


def ours(precision: str, shape: tuple[int, int], dropout: float):
    keep_freed_memory()
    config, model, source, target = build(shape, dropout)
    cpu_patches.apply_to_model(model, World().device)
    state = make_state(model, config, precision, World())
    rows, tokens = shape
    lengths = torch.full((rows,), tokens)
    batch = TextBatch(torch.arange(rows), source, target, lengths, model.plan(source, target, MASK))

    def forward(model, batch):
        return model(batch.src_tokens, batch.target_tokens, MASK, batch.plan)

    run = Run(config, World(), precision, forward, state)

    def step():
        result = train_update(run, [batch])
        return float(result.loss_sum / result.sample_size), float(result.grad_norm)

    return step


def plain(precision: str, shape: tuple[int, int], dropout: float):
    config, model, *batch = build(shape, dropout)
    optimizer = data2vec_plain.PlainAdam(model.parameters())
    autocast = contextlib.nullcontext
    if precision != "fp32":
        autocast = functools.partial(torch.autocast, "cpu", dtype=DTYPES[precision])
    rates = iter([0.0, *[config.optimization.lr[0]] * 1000])

    def step():
        return data2vec_plain.step(model, optimizer, batch, MASK, next(rates), 0.999, 5.0, autocast)

    return step


class Worker:
    """A process that does a step when told to; `seconds` of a call are its own CPU seconds."""

    def __init__(self, side: str, precision: str, shape: tuple[int, int], dropout: float):
        command = [sys.executable, "-m", "ci.peers.data2vec_step", "--worker", side, "--precision", precision]
        command += ["--rows", str(shape[0]), "--tokens", str(shape[1]), "--dropout", str(dropout)]
        self.process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def step(self) -> dict[str, float]:
        self.process.stdin.write("step\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def work(side: str, precision: str, shape: tuple[int, int], dropout: float) -> None:
    torch.set_num_threads(1)
    step = {"ours": ours, "plain": plain}[side](precision, shape, dropout)
    for _ in sys.stdin:
        began = time.process_time()
        loss, norm = step()
        print(json.dumps({"seconds": time.process_time() - began, "loss": loss, "norm": norm}), flush=True)


def useful_flop(shape: tuple[int, int]) -> float:
    """Matrix products of our step: 2 FLOP a multiply-add; backward twice the forward; see the model's row counts."""
    width, inner, layers, heads_width = 768, 3072, 12, 768
    _, model, source, target = build(shape, 0.0)
    plan = model.plan(source, target, MASK)
    masked, teacher = len(plan.rows.flat), plan.teacher_tokens.numel()

    def layer(queries: int, keys: int, tokens: int) -> float:
        projections = 2 * width * width * (2 * queries + 2 * tokens) + 4 * queries * width * inner
        return projections + 4 * queries * keys * heads_width

    rows, length = shape
    tokens = rows * length
    student = (layers - 1) * layer(tokens, length, tokens) + layer(masked, length, tokens) + 8 * masked * width * width
    return 3 * student + layers * layer(teacher, teacher // rows, teacher)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--precision", choices=DTYPES, default="fp32")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rows", type=int, default=4, help="samples")
    parser.add_argument("--tokens", type=int, default=512, help="of a sample")
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--worker", choices=("ours", "plain"))
    options = parser.parse_args()
    shape = options.rows, options.tokens
    if options.worker:
        return work(options.worker, options.precision, shape, options.dropout)
    devices.seed_everything(0)
    torch.set_num_threads(1)
    check = [Worker(side, options.precision, shape, 0.0) for side in ("ours", "plain")]
    # Steps to compare, and to warm up: the heap grows for three. Emulated bf16 takes the plain side minutes a step.
    count = 3 if options.precision == "fp32" else 1
    steps = [[worker.step() for _ in range(count)] for worker in check]
    for worker in check:
        worker.close()
    tolerance = 1e-4 if options.precision == "fp32" else 2e-2
    for a, b in zip(*steps, strict=True):
        for key in ("loss", "norm"):
            assert abs(a[key] - b[key]) < tolerance * abs(b[key]), (key, a, b)

    sides = {side: Worker(side, options.precision, shape, options.dropout) for side in ("ours", "plain")}
    seconds = {side: [] for side in sides}
    for index in range(count + options.rounds):
        for side in sorted(sides, reverse=index % 2 == 1):
            taken = sides[side].step()["seconds"]
            if index >= count:
                seconds[side].append(taken)
    for worker in sides.values():
        worker.close()
    ratio = ratio_of(list(zip(seconds["ours"], seconds["plain"], strict=True)))
    # a CPU without bf16 instructions multiplies bf16 numbers fastest in fp32 (common/cpu.py): that is its peak
    peak = max(gemm_peak(dtype) for dtype in {DTYPES[options.precision], torch.float32})
    flop = useful_flop(shape)
    what = f"{options.rows} x {options.tokens} tokens, dropout {options.dropout}, {options.precision}"
    write_result(
        f"data2vec_step_{options.precision}",
        {
            "what": f"data2vec text base, {what}",
            "plain_over_ours": ratio,
            "equal_without_dropout": {"ours": steps[0], "plain": steps[1]},
            "gemm_gflop_per_second": round(peak / 1e9, 1),
            "share_of_gemm_peak": round(flop / ratio["ours_seconds"] / peak, 3),
        },
    )


def ratio_of(pairs: list[tuple[float, float]]) -> dict[str, float]:
    """Of (ours, plain) seconds: median, smallest and largest ratio, median seconds of each."""
    ratios = [plain / ours for ours, plain in pairs]
    return {
        "median": round(statistics.median(ratios), 3),
        "low": round(min(ratios), 3),
        "high": round(max(ratios), 3),
        "ours_seconds": round(statistics.median(o for o, _ in pairs), 2),
        "plain_seconds": round(statistics.median(p for _, p in pairs), 2),
    }


if __name__ == "__main__":
    main()
