"""Where the cycles of a ViT-B block go in bf16 and in fp32 on this CPU: forward and backward at one thread.

    python -m ci.peers.bf16_block [--rounds 5]

Shares are of the profiler's own time of operators; the rate counts the block's matrix products, against the best square
product of that type in the same run. Only a CPU with bf16 instructions says something about bf16.
"""

from __future__ import annotations

import argparse
import re
import statistics

import torch
from torch.profiler import ProfilerActivity, profile

from ci.peers.paired_timing import cpu_seconds, gemm_peak, write_result
from common.cpu import keep_freed_memory
from vit import cpu_patches
from vit.model.vision_transformer import create_model

BATCH, TOKENS, WIDTH = 8, 197, 768
FLOPS = 3 * BATCH * (24 * TOKENS * WIDTH**2 + 4 * TOKENS**2 * WIDTH)  # forward, and backward of twice that
GROUPS = {
    "matrix products": r"::mm$|addmm|linear|mkldnn",
    "attention": r"scaled_dot|flash|softmax|bmm",
    "GELU": "gelu",
    "LayerNorm": "layer_norm",
    "changes of type": r"copy_|_to_copy",
    "sums": r"sum",
}
COLUMNS = ("", "bf16", "bf16, torch's fused attention", "fp32")


def profiled(step) -> dict[str, float]:
    """Share of each group of operators in the CPU time of a few steps."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        for _ in range(3):
            step()
    shares = dict.fromkeys([*GROUPS, "other"], 0.0)
    events = profiler.key_averages()
    total = sum(event.self_cpu_time_total for event in events)
    for event in events:
        group = next((name for name, pattern in GROUPS.items() if re.search(pattern, event.key)), "other")
        shares[group] += event.self_cpu_time_total / total
    return shares


def measure(block: torch.nn.Module, dtype: torch.dtype, rounds: int) -> dict[str, str]:
    x = torch.randn(BATCH, TOKENS, WIDTH, requires_grad=True)  # [B, N, D]
    grad = torch.randn(BATCH, TOKENS, WIDTH)  # [B, N, D]

    def step() -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            out = block(x)  # [B, N, D]
        out.backward(grad.to(out.dtype))
        block.zero_grad()

    for _ in range(2):
        step()
    peaks, seconds = [], []
    for _ in range(rounds):
        peaks.append(gemm_peak(dtype, 1.0))
        seconds.append(cpu_seconds(step))
    shares = sorted(100 * FLOPS / s / p for s, p in zip(seconds, peaks, strict=True))
    found = {
        "CPU ms of 8 pictures": f"{1e3 * statistics.median(seconds):.0f}",
        "GFLOP/s of the best square product": f"{statistics.median(peaks) / 1e9:.0f}",
        "share of it (range)": f"{statistics.median(shares):.0f} % ({shares[0]:.0f} to {shares[-1]:.0f})",
    }
    return found | {f"of the time: {name}": f"{100 * value:.1f} %" for name, value in profiled(step).items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    models = [create_model("vit_base_p16", 1000, drop_path=0.0).train() for _ in range(2)]
    cpu_patches.apply(models[0], torch.device("cpu"))
    ours, plain = (model.blocks[0] for model in models)
    works = ((ours, torch.bfloat16), (plain, torch.bfloat16), (ours, torch.float32))
    columns = [measure(block, dtype, options.rounds) for block, dtype in works]
    rows = [[name, *(column[name] for column in columns)] for name in columns[0]]
    write_result("table_bf16_block", {"columns": COLUMNS, "rows": rows})


if __name__ == "__main__":
    main()
