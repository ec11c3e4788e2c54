"""Patch dropout (FLIP, arXiv:2212.00794): in training the vision tower sees a random part of each picture's patches."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import CLIPVisionModel, PreTrainedModel
from transformers.models.clip.modeling_clip import CLIPVisionEmbeddings

from common.errors import UsageError


class PartialEmbeddings(CLIPVisionEmbeddings):
    """`CLIPVisionEmbeddings` of a part of the patches, which keep their positions: [B, 1 + N, C] -> [B, 1 + K, C]."""

    share: float  # K / N

    def forward(self, pixel_values: Tensor, **kwargs: Any) -> Tensor:
        x = super().forward(pixel_values, **kwargs)  # [B, 1 + N, C]
        if not self.training:
            return x
        first, patches = x[:, :1], x[:, 1:]
        # from torch's generator, which the trainer seeds from (seed, step, rank, chunk)
        chosen = torch.rand(patches.shape[:2], device=x.device).topk(self.kept(patches.shape[1])).indices  # [B, K]
        patches = patches.gather(1, chosen[..., None].expand(-1, -1, patches.shape[2]))  # [B, K, C]
        return torch.cat([first, patches], 1)

    def kept(self, patches: int) -> int:
        return max(1, round(self.share * patches))


def kept(model: PreTrainedModel, patches: int) -> int:
    """How many of a picture's patches training sees."""
    embeddings = getattr(model.vision_model, "embeddings", None)
    return embeddings.kept(patches) if isinstance(embeddings, PartialEmbeddings) else patches


def keep_patches(model: PreTrainedModel, share: float) -> None:
    """Makes the vision tower train on that share of the patches; 1 changes nothing. Evaluation has all of them.

    Raises:
        UsageError: another vision tower than CLIP's.
    """
    if share == 1:
        return
    if not isinstance(model.vision_model, CLIPVisionModel):
        kind = model.config.vision_config.model_type
        raise UsageError(f"--keep_patches is for CLIP's vision tower, this one is {kind!r}; leave it out")
    model.vision_model.embeddings.__class__ = PartialEmbeddings
    model.vision_model.embeddings.share = share
