"""CPU seconds of a CLIP training step at one thread, by turns with a peer; base model, batch 8, COCO-like captions.

    python -m ci.peers.clip_step                       # against the upstream example: captions padded to 128
    python -m ci.peers.clip_step --case bf16           # our bf16 against our fp32
    python -m ci.peers.clip_step --case bf16_upstream  # both in bf16
    python -m ci.peers.clip_step --case open_clip      # against open_clip ViT-B-32 (if installed)

All steps: forward, loss, backward, clipping, fused AdamW (ci/peers/steps/clip.py). Freed memory is kept, as in runs;
the peer has the good of it too. The shares of the GEMM peak count the products that each side really does; beside it
ours by the products of the same model and batch in plain transformers, of which our layers leave out a tenth.
The peak is that of a side's own precision.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from torch.utils.flop_counter import FlopCounterMode

from ci.peers.paired_timing import gemm_peak, paired, write_result
from ci.peers.steps import clip
from common.cpu import keep_freed_memory

# case: (precision of ours, the peer, its precision, what the result calls it)
CASES = {
    "upstream": ("fp32", "upstream example", "fp32", "run_clip.py example, length 128"),
    "open_clip": ("fp32", "open_clip", "fp32", "open_clip"),
    "bf16": ("bf16", "ours", "fp32", "ours in fp32"),
    "bf16_upstream": ("bf16", "upstream example", "bf16", "run_clip.py example, length 128, bf16"),
}


def build(side: str, precision: str) -> Callable[[], object]:
    return clip.SIDES[side]("cpu", torch.device("cpu"), precision, False).run


def flops(step: Callable[[], object]) -> int:
    with FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops()


def model_flops() -> int:
    """Of one step of our model as transformers computes it, captions padded to their bucket."""
    device, shape = torch.device("cpu"), clip.SIZES["cpu"]
    model = clip.dual_encoder(shape, device)
    pixels, captions = clip.pairs(shape, device)
    batch = {"pixel_values": pixels.float(), **clip.pad_captions(captions, clip.PAD, clip.EXAMPLE_LENGTH)}
    return flops(lambda: model(**batch, return_loss=True).loss.backward())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=CASES, default="upstream")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    precision, peer, peer_precision, peer_name = CASES[options.case]
    ours, theirs = build("ours", precision), build(peer, peer_precision)
    done, done_by_peer, needed = flops(ours), flops(theirs), model_flops()
    ratio = paired(ours, theirs, options.rounds, warmup=0)
    # of a side's own precision; without bf16 instructions bf16 numbers are multiplied fastest in fp32 (common/cpu.py)
    single = gemm_peak(torch.float32)
    half = max(single, gemm_peak(torch.bfloat16)) if "bf16" in (precision, peer_precision) else single
    peak, peer_peak = (half if name == "bf16" else single for name in (precision, peer_precision))
    result = {
        "batch": clip.SIZES["cpu"]["batch"],
        "ours": precision,
        "peer": peer_name,
        "seconds": {"ours": round(ratio.a_seconds, 3), "peer": round(ratio.b_seconds, 3)},
        "peer_over_ours": {"median": round(ratio.median, 3), "range": [round(ratio.low, 3), round(ratio.high, 3)]},
        "gemm_gflops": round(peak / 1e9, 1),
        "share_of_gemm_peak": {
            "ours": round(done / ratio.a_seconds / peak, 3),
            "ours_by_the_models_products": round(needed / ratio.a_seconds / peak, 3),
            "peer": round(done_by_peer / ratio.b_seconds / peer_peak, 3),
        },
    }
    write_result(f"clip_step_{options.case}", result)


if __name__ == "__main__":
    main()
