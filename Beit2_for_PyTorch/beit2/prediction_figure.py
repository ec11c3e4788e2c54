"""A figure of what a pretrained model predicts: picture, masked input, its tokens, the predicted tokens."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from beit2.model.masked_image_model import MaskedImageModel
from beit2.model.tokenizer import VQKD
from common.errors import UsageError

ROWS = ("picture", "masked", "its tokens", "hidden ones\npredicted")


def code_colours(codes: Tensor) -> Tensor:
    """RGB in [0, 1] by code: the three main directions of the codebook [n, C], each stretched to 5..95 %; [n, 3]."""
    centred = codes.float() - codes.float().mean(dim=0)
    _, _, directions = torch.linalg.svd(centred, full_matrices=False)
    projected = centred @ directions[:3].T  # [n, 3]
    low, high = torch.quantile(projected, torch.tensor([0.05, 0.95]), dim=0)
    return ((projected - low) / (high - low).clamp(min=1e-6)).clamp(0, 1)


@torch.no_grad()
def code_patches(tokenizer: VQKD, visual: Tensor) -> Tensor:
    """What a code stands for: the mean of the patches that have it, of pictures in [0, 1], [B, 3, H, W].

    Returns:
        [n, 3, P, P]; grey for a code that no patch has.
    """
    tokens = torch.cat([tokenizer.get_codebook_indices(part) for part in visual.split(64)])  # [B, N]
    side = visual.shape[-1] // tokenizer.window_size[1]
    patches = F.unfold(visual, side, stride=side).transpose(1, 2).flatten(0, 1)  # [B * N, 3 * P * P]
    sums = torch.zeros(tokenizer.n_code, patches.shape[1]).index_add_(0, tokens.flatten(), patches)
    count = tokens.flatten().bincount(minlength=tokenizer.n_code).unsqueeze(1)  # [n, 1]
    means = torch.where(count > 0, sums / count.clamp(min=1), torch.full_like(sums, 0.5))
    return means.view(-1, 3, side, side)


@torch.no_grad()
def prediction_rows(
    model: MaskedImageModel,
    tokenizer: VQKD,
    unit: Tensor,
    normalized: Tensor,
    visual: Tensor,
    mask: Tensor,
    patches: Tensor,
) -> list[np.ndarray]:
    """Four picture rows, each [B, H, W, 3] in [0, 1]: pictures, masked, tokens, tokens with the masked ones predicted.

    Args:
        unit: pictures in [0, 1], [B, 3, H, W]; `normalized` the same for the model, `visual` for the tokenizer.
        mask: bool [B, h, w].
        patches: what every code stands for, of `code_patches`.
    """
    tokens = tokenizer.get_codebook_indices(visual)  # [B, N]
    logits = model(normalized, mask.flatten(1), return_all_tokens=True)
    predicted = (logits[0] if isinstance(logits, list) else logits).argmax(dim=-1)  # [B, N]
    filled = torch.where(mask.flatten(1), predicted, tokens)
    size = unit.shape[-2:]

    hidden = _enlarged(mask.unsqueeze(1), size)
    rows = [unit, unit * (1 - hidden) + 0.5 * hidden]
    pictures = [row.permute(0, 2, 3, 1).cpu().numpy() for row in rows]
    height, width = tokenizer.window_size
    for ids in (tokens, filled):
        mosaic = patches[ids].unflatten(1, (height, width))  # [B, h, w, 3, P, P]
        pictures.append(mosaic.permute(0, 1, 4, 2, 5, 3).flatten(3, 4).flatten(1, 2).cpu().numpy())  # [B, H, W, 3]
    return pictures


def token_pictures(tokenizer: VQKD, tokens: Tensor, size: tuple[int, int]) -> np.ndarray:
    """tokens int64 [B, N] -> every patch in the colour of its code, [B, H, W, 3] in [0, 1]."""
    colours = code_colours(tokenizer.quantize.embedding.weight)[tokens]  # [B, N, 3]
    grid = colours.unflatten(1, tokenizer.window_size).permute(0, 3, 1, 2)
    return _enlarged(grid, size).permute(0, 2, 3, 1).cpu().numpy()


def _enlarged(grid: Tensor, size: tuple[int, int]) -> Tensor:
    return torch.nn.functional.interpolate(grid.float(), size, mode="nearest")  # [B, c, H, W]


def check_figure(path: Path, option: str) -> None:
    """Before anything is computed for it.

    Raises:
        UsageError: no name of a picture.
    """
    from matplotlib.backend_bases import FigureCanvasBase

    known = FigureCanvasBase.get_supported_filetypes()
    if path.suffix.lower().lstrip(".") not in known:
        raise UsageError(f"{option} {path}: name a picture, such as a .png (known: {' '.join(sorted(known))})")
