"""A figure of what a pretrained model predicts: picture, masked input, its tokens, the predicted tokens."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from beit2.model.masked_image_model import MaskedImageModel
from beit2.model.tokenizer import VQKD


def code_colours(codes: Tensor) -> Tensor:
    """RGB in [0, 1] by code: the three main directions of the codebook [n, C], each stretched to 5..95 %; [n, 3]."""
    centred = codes.float() - codes.float().mean(dim=0)
    _, _, directions = torch.linalg.svd(centred, full_matrices=False)
    projected = centred @ directions[:3].T  # [n, 3]
    low, high = torch.quantile(projected, torch.tensor([0.05, 0.95]), dim=0)
    return ((projected - low) / (high - low).clamp(min=1e-6)).clamp(0, 1)


@torch.no_grad()
def prediction_rows(
    model: MaskedImageModel, tokenizer: VQKD, unit: Tensor, normalized: Tensor, visual: Tensor, mask: Tensor
) -> list[np.ndarray]:
    """Four picture rows, each [B, H, W, 3] in [0, 1]: pictures, masked, tokens, tokens with the masked ones predicted.

    Args:
        unit: pictures in [0, 1], [B, 3, H, W]; `normalized` the same for the model, `visual` for the tokenizer.
        mask: bool [B, h, w].
    """
    colours = code_colours(tokenizer.quantize.embedding.weight)
    tokens = tokenizer.get_codebook_indices(visual)  # [B, N]
    logits = model(normalized, mask.flatten(1), return_all_tokens=True)
    predicted = (logits[0] if isinstance(logits, list) else logits).argmax(dim=-1)  # [B, N]
    filled = torch.where(mask.flatten(1), predicted, tokens)
    size = unit.shape[-2:]

    def enlarge(grid: Tensor) -> Tensor:
        return torch.nn.functional.interpolate(grid.float(), size, mode="nearest")  # [B, c, H, W]

    hidden = enlarge(mask.unsqueeze(1))
    grids = [colours[ids].unflatten(1, mask.shape[1:]).permute(0, 3, 1, 2) for ids in (tokens, filled)]
    rows = [unit, unit * (1 - hidden) + 0.5 * hidden, *(enlarge(grid) for grid in grids)]
    return [row.permute(0, 2, 3, 1).cpu().numpy() for row in rows]


def draw(rows: list[np.ndarray], path: Path) -> None:
    """Writes the rows as one figure."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    titles = ("picture", "masked", "tokens", "with predicted")
    count = len(rows[0])
    figure, axes = pyplot.subplots(len(rows), count, figsize=(1.6 * count, 6.6), layout="constrained", squeeze=False)
    for row, title, line in zip(rows, titles, axes, strict=True):
        for picture, cell in zip(row, line, strict=True):
            cell.imshow(picture)
            cell.set(xticks=[], yticks=[])
        line[0].set_ylabel(title)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
