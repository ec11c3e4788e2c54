"""CPU seconds of a CLIP training step at one thread, by turns with a peer; base model, batch 8, COCO-like captions.

    python -m ci.peers.clip_step                 # against the upstream example: captions padded to 128
    python -m ci.peers.clip_step --case bf16     # bf16 against fp32
    python -m ci.peers.clip_step --case open_clip   # share of the GEMM peak, against open_clip ViT-B-32 (if installed)

All steps: forward, loss, backward, clipping, fused AdamW. Random weights and pixels; the caption lengths are COCO's
(mean 13 tokens with the two special ones, the longest of a batch of 8 about 16).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "CLIP_for_PyTorch")]

import clip_pretraining  # noqa: E402, F401  mends torchvision for transformers

# isort: split
import numpy as np  # noqa: E402
import torch  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402
from transformers import (  # noqa: E402
    CLIPVisionConfig,
    RobertaConfig,
    VisionTextDualEncoderConfig,
    VisionTextDualEncoderModel,
)

from ci.peers.paired_timing import gemm_peak, paired, write_result  # noqa: E402
from clip_pretraining.evaluation import normalise_pixels  # noqa: E402
from clip_pretraining.loss import contrastive_loss  # noqa: E402
from clip_pretraining.tokenization import pad_captions  # noqa: E402
from common.device import autocast  # noqa: E402

BATCH = 8
LENGTHS = (11, 12, 12, 13, 13, 14, 15, 16)  # tokens of eight COCO captions, <s> and </s> included


def dual_encoder() -> tuple[VisionTextDualEncoderModel, torch.optim.Optimizer]:
    """CLIP ViT-B/32 + RoBERTa-base as save_clip_roberta.py joins them, in training mode (dropout on)."""
    torch.manual_seed(0)
    vision = CLIPVisionConfig(hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=3072)
    text = RobertaConfig(vocab_size=50265, max_position_embeddings=514, type_vocab_size=1)
    config = VisionTextDualEncoderConfig.from_vision_text_configs(vision, text)
    model = VisionTextDualEncoderModel(config).train()
    return model, torch.optim.AdamW(model.parameters(), lr=5e-5, weight_decay=0.1, fused=True)


def update(model: torch.nn.Module, optimizer: torch.optim.Optimizer, loss: torch.Tensor) -> None:
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()


def captions() -> list[np.ndarray]:
    draw = np.random.default_rng(0)
    return [draw.integers(5, 50000, n).astype(np.int32) for n in LENGTHS]


def our_step(model, optimizer, precision: str = "fp32") -> Callable[[], None]:
    """As trainer.py does it: uint8 pixels, captions padded to their bucket, loss of loss.py."""
    batch = pad_captions(captions(), pad_token_id=1, max_length=128)
    pixels = torch.randint(0, 256, (BATCH, 3, 224, 224), dtype=torch.uint8)
    mean, std = torch.tensor([0.48, 0.46, 0.41]), torch.tensor([0.27, 0.26, 0.28])

    def step() -> None:
        with autocast(torch.device("cpu"), precision):
            output = model(**batch, pixel_values=normalise_pixels(pixels, mean, std))
        image, text = output.image_embeds.float(), output.text_embeds.float()
        update(model, optimizer, contrastive_loss(image, text, model.logit_scale))

    return step


def upstream_step(model, optimizer) -> Callable[[], None]:
    """As transformers' example run_clip.py: float pixels, padding="max_length" to 128, the model's own loss."""
    ids = torch.full((BATCH, 128), 1)
    mask = torch.zeros_like(ids)
    for row, tokens in enumerate(captions()):
        ids[row, : len(tokens)] = torch.from_numpy(tokens.astype(np.int64))
        mask[row, : len(tokens)] = 1
    pixels = torch.randn(BATCH, 3, 224, 224)

    def step() -> None:
        output = model(input_ids=ids, attention_mask=mask, pixel_values=pixels, return_loss=True)
        update(model, optimizer, output.loss)

    return step


def open_clip_step() -> Callable[[], None]:
    """open_clip ViT-B-32 with its own loss; 77 positions whatever the captions."""
    try:
        import open_clip
    except ImportError:
        raise SystemExit("error: this case needs the peer: pip install open_clip_torch==3.3.0") from None
    torch.manual_seed(0)
    model = open_clip.create_model("ViT-B-32").train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-5, weight_decay=0.1, fused=True)
    loss = open_clip.ClipLoss()
    ids = torch.zeros(BATCH, 77, dtype=torch.long)
    for row, tokens in enumerate(captions()):
        ids[row, : len(tokens)] = torch.from_numpy(tokens.astype(np.int64)).clamp(max=49000)
        ids[row, len(tokens) - 1] = 49407  # the end-of-text token, where open_clip pools
    pixels = torch.randn(BATCH, 3, 224, 224)
    return lambda: update(model, optimizer, loss(*model(pixels, ids)))


def flops(step: Callable[[], None]) -> int:
    with FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=["upstream", "bf16", "open_clip"], default="upstream")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    model, optimizer = dual_encoder()
    a = our_step(model, optimizer, "bf16" if options.case == "bf16" else "fp32")
    b = {
        "upstream": lambda: upstream_step(model, optimizer),
        "bf16": lambda: our_step(model, optimizer),
        "open_clip": open_clip_step,
    }[options.case]()
    ratio = paired(a, b, options.rounds)
    peak = gemm_peak(torch.float32)
    result = {
        "batch": BATCH,
        "ours": "bf16" if options.case == "bf16" else "fp32",
        "peer": {"upstream": "run_clip.py example, length 128", "bf16": "ours in fp32"}.get(options.case, "open_clip"),
        "seconds": {"ours": round(ratio.a_seconds, 3), "peer": round(ratio.b_seconds, 3)},
        "peer_over_ours": {"median": round(ratio.median, 3), "range": [round(ratio.low, 3), round(ratio.high, 3)]},
        "fp32_gemm_gflops": round(peak / 1e9, 1),
        "share_of_fp32_gemm_peak": {
            "ours": round(flops(a) / ratio.a_seconds / peak, 3),
            "peer": round(flops(b) / ratio.b_seconds / peak, 3),
        },
    }
    write_result(f"clip_step_{options.case}", result)


if __name__ == "__main__":
    main()
