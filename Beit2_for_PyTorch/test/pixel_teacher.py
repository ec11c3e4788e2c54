"""Writes a teacher that was trained on nothing: a DINO ViT without blocks whose patch features are the patch's pixels.

    python pixel_teacher.py FILE [PATCH [SIDE]]

A patch is averaged to 4 x 4 pixels; its feature is these values and one minus them, so that the ViT's last LayerNorm,
which takes the mean away, leaves white and black apart.
"""

import sys

import torch

CELLS = 4
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, as a DINO teacher's pictures are normalised


def pixel_teacher(patch: int, side: int) -> dict[str, torch.Tensor]:
    """State dict, under timm's names, of a ViT [B, 3, side, side] -> [B, (side / patch)^2, 6 * CELLS^2]."""
    cell = patch // CELLS
    average = torch.zeros(3, CELLS, CELLS, 3, patch, patch)
    for channel in range(3):
        for row in range(CELLS):
            for column in range(CELLS):
                rows, columns = (slice(i * cell, (i + 1) * cell) for i in (row, column))
                # the teacher's pictures come normalised: back to 0..1
                average[channel, row, column, channel, rows, columns] = STD[channel] / cell**2
    weight = average.flatten(0, 2)  # [3 * CELLS^2, 3, patch, patch]
    bias = torch.tensor(MEAN).repeat_interleave(CELLS**2)
    width = 2 * len(weight)
    return {
        "cls_token": torch.zeros(1, 1, width),
        "pos_embed": torch.zeros(1, 1 + (side // patch) ** 2, width),
        "patch_embed.proj.weight": torch.cat((weight, -weight)),
        "patch_embed.proj.bias": torch.cat((bias, 1 - bias)),
        "norm.weight": torch.ones(width),
        "norm.bias": torch.zeros(width),
    }


if __name__ == "__main__":
    torch.save(pixel_teacher(*(int(value) for value in (sys.argv[2:4] or ["8", "48"]))), sys.argv[1])
