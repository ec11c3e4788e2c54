"""From the loader's bytes to what model and tokenizer take."""

from __future__ import annotations

import torch

from beit2.data.images import Batch


class Normalizer:
    """uint8 pictures to what model and tokenizer take, on the device."""

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...], device: torch.device):
        self.device = device
        self.mean = torch.tensor(mean, device=device).view(3, 1, 1)
        self.std = torch.tensor(std, device=device).view(3, 1, 1)

    def unit(self, pictures: torch.Tensor) -> torch.Tensor:
        """uint8 [B, H, W, 3] -> fp32 [B, 3, H, W] in [0, 1] on the device."""
        pictures = pictures.to(self.device, non_blocking=True).permute(0, 3, 1, 2)
        return pictures.contiguous().float() / 255

    def __call__(self, unit: torch.Tensor) -> torch.Tensor:
        """[0, 1] -> normalised."""
        return (unit - self.mean) / self.std

    def views(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """The model's pictures, normalised, and the tokenizer's, in [0, 1]."""
        unit = self.unit(batch.views)
        return self(unit), unit if batch.second_views is None else self.unit(batch.second_views)
