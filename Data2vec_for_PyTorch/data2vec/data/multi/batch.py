"""One micro-batch of data2vec 2.0, of text or of pictures."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from common.device import to_device
from data2vec.model.multi.mask_plan import MaskPlan


@dataclass
class MultiBatch:
    """An empty shard's batch has no rows and no plan."""

    id: torch.Tensor  # [B], on the CPU
    source: torch.Tensor  # token ids int64 [B, T], right-padded, or pictures uint8 [B, 3, S, S]
    plan: MaskPlan | None
    names: list[str]  # of samples, for messages
    num_tokens: int  # real tokens, or patches
    has_padding: bool = False

    def to(self, device: torch.device) -> MultiBatch:
        if device.type == "cpu":
            return self
        plan = self.plan.to(device) if self.plan else None
        return replace(self, source=to_device(self.source, device), plan=plan)
