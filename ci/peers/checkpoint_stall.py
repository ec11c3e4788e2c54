"""How long a training stands still for a checkpoint: written at once, and behind the training. Wall seconds.

    python -m ci.peers.checkpoint_stall [--rounds 5]

ViT-B with its AdamW state, as one file and as FSDP2's shards (here of one rank), by turns. The first save behind the
training also makes the copy's memory; a training pays for that once.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path

import torch

from ci.peers.paired_timing import write_result
from common import checkpoint_file, shards
from common.checkpoint.background_write import BackgroundWriter
from common.distributed import process_group
from vit.model.vision_transformer import create_model

ALONE = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
COLUMNS = ("state", "at once, s", "the first behind, s", "the next, s (range)", "share")


def stalls(save, rounds: int) -> tuple[float, float, list[float]]:
    """Seconds that `save(writer)` takes: at once (median), the first time behind the training, and from then on."""
    writer, at_once, behind = BackgroundWriter(), [], []
    for _ in range(rounds + 1):
        for setting, seconds in (("0", at_once), ("1", behind)):
            os.environ["BACKGROUND_WRITE"] = setting
            began = time.perf_counter()
            save(writer)
            seconds.append(time.perf_counter() - began)
            writer.wait()
    return statistics.median(at_once), behind[0], behind[1:]


def row(name: str, size: int, save, rounds: int) -> list[str]:
    at_once, first, later = stalls(save, rounds)
    share = statistics.median(later) / at_once
    spread = f"{statistics.median(later):.2f} ({min(later):.2f} to {max(later):.2f})"
    return [f"{name}, {size >> 20} MiB", f"{at_once:.1f}", f"{first:.2f}", spread, f"{100 * share:.1f} %"]


def trained(model: torch.nn.Module) -> torch.optim.Optimizer:
    """An optimizer that has its state."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, fused=True)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    return optimizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--model", default="vit_base_p16")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    with tempfile.TemporaryDirectory() as name:
        model = create_model(options.model, 1000)
        optimizer = trained(model)
        size = 3 * sum(p.numel() * p.element_size() for p in model.parameters())

        def save_file(writer: BackgroundWriter) -> None:
            content = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            writer.submit(content, lambda kept: checkpoint_file.save(kept, Path(name) / "checkpoint.pt"))

        rows.append(row("a file", size, save_file, options.rounds))
        os.environ.update(ALONE)
        with process_group("cpu") as world:
            shards.shard(model, model.blocks, world, "fp32")
            optimizer = trained(model)

            def save_shards(writer: BackgroundWriter) -> None:
                shards.save_shards(Path(name) / "checkpoint-sharded", {}, optimizer, model, writer)

            rows.append(row("shards", size, save_shards, options.rounds))
    write_result("table_checkpoint_stall", {"columns": COLUMNS, "rows": rows})


if __name__ == "__main__":
    main()
