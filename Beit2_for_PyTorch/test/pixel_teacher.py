"""Writes a teacher that knows no label and nothing else: a DINO ViT without blocks whose patch features are the pixels.

    python pixel_teacher.py FILE [PATCH [SIDE]]

A patch's feature is its own pixels, less their mean and over their deviation (the ViT's last LayerNorm), plus a
constant: without it a patch of one grey would have no direction, which is all that the tokenizer's loss looks at.
"""

import sys

import torch

EVEN_PATCH = 0.5


def pixel_teacher(patch: int, side: int) -> dict[str, torch.Tensor]:
    """State dict, under timm's names, of a ViT [B, 3, side, side] -> [B, (side / patch)^2, 3 * patch^2]."""
    width = 3 * patch * patch
    return {
        "cls_token": torch.zeros(1, 1, width),
        "pos_embed": torch.zeros(1, 1 + (side // patch) ** 2, width),
        "patch_embed.proj.weight": torch.eye(width).view(width, 3, patch, patch),
        "patch_embed.proj.bias": torch.zeros(width),
        "norm.weight": torch.ones(width),
        "norm.bias": torch.full((width,), EVEN_PATCH),
    }


if __name__ == "__main__":
    torch.save(pixel_teacher(*(int(value) for value in [*sys.argv[2:4], "8", "48"][:2])), sys.argv[1])
