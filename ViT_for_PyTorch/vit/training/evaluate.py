"""Exact evaluation: every picture is counted once, on any number of ranks."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from common import device as devices
from common.distributed import World, all_reduce_sum
from vit.data.loader import Batch, to_model_input
from vit.model.vision_transformer import ClassifyingViT
from vit.training.metrics import topk_correct

if TYPE_CHECKING:
    from vit.training.class_report import ClassTally


@dataclass(frozen=True)
class Score:
    """Counts over the whole set, and the mean cross entropy; None where there is none, as in k-NN."""

    top1: int
    top5: int
    count: int
    loss: float | None

    @property
    def top1_percent(self) -> float:
        return round(100 * self.top1 / self.count, 4)

    @property
    def top5_percent(self) -> float:
        return round(100 * self.top5 / self.count, 4)

    @property
    def metrics(self) -> dict[str, float | None]:
        """What is logged, and what the best checkpoint is chosen by."""
        return {"top1": self.top1_percent, "top5": self.top5_percent, "loss": self.loss}

    def __str__(self) -> str:
        return (
            f"top-1 {self.top1_percent:.3f} % ({self.top1} of {self.count}), "
            f"top-5 {self.top5_percent:.3f} % ({self.top5} of {self.count})"
        ) + ("" if self.loss is None else f", loss {self.loss:.5f}")


@torch.no_grad()
def evaluate_model(
    model: ClassifyingViT, batches: Iterable[Batch], world: World, precision: str, tally: ClassTally | None = None
) -> Score:
    """Scores a model on this rank's share of the set and adds the ranks up.

    Args:
        model: its description says how pictures are normalised; left in the mode it was in.
        batches: of this rank; ranks may have different numbers of them, also none.
        world: this process and its device.
        precision: of the forward pass; the counts are integers, the loss is taken in fp32.
        tally: counted into, class by class, and added up over the ranks.
    """
    was_training = model.training
    model.eval()
    counts = torch.zeros(3, dtype=torch.int64, device=world.device)  # top-1, top-5, pictures
    loss_sum = torch.zeros((), dtype=torch.float32, device=world.device)
    not_finite = torch.zeros((), dtype=torch.int64, device=world.device)
    for batch in batches:
        images, target = to_model_input(batch, world.device, model.config)  # [B, 3, H, W], [B]
        with devices.autocast(world.device, precision):
            logits = model(images)  # [B, C]
        counts += topk_correct(logits, target)
        if tally is not None:
            tally.add(logits, target)
        not_finite += (~logits.isfinite()).any()
        loss_sum += F.cross_entropy(logits.float(), target, reduction="sum")
    model.train(was_training)
    if int(all_reduce_sum(not_finite)):
        raise FloatingPointError(
            "evaluation: the scores of some pictures are inf or nan: the weights are damaged, or --precision is too "
            "low for them"
        )
    if tally is not None:
        tally.reduce()
    top1, top5, count = all_reduce_sum(counts).tolist()
    return Score(top1, top5, count, all_reduce_sum(loss_sum).item() / max(count, 1))
