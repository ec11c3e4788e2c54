"""Starting weights for narrow models trained from scratch; the default elsewhere is timm's (standard deviation 0.02).

0.02 is right near width 768, where it is 0.55 / sqrt(fan in). At width 64 it is 0.16 / sqrt(fan in): signals and
gradients fade over the blocks and a short training spends its time on scaling the weights up.

Attention can start as in trained models (Trockman and Kolter, "Mimetic initialization of self-attention layers",
arXiv:2305.09828), where the product of query and key weights is near a positive identity, that of value and output
weights near a negative one: with sinusoidal positions tokens attend to those nearby and alike, a soft convolution.
"""

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from vit.model.conv_stem import ConvStem

POSITION_STD = 0.1
# strengths of identity and noise in the two products, the paper's for vision models
QK_IDENTITY, QK_NOISE, VO_IDENTITY, VO_NOISE = 0.7, 0.7, -0.4, 0.4
_WAVELENGTH = 10_000.0


@torch.no_grad()
def scale_with_width(model: VisionTransformer) -> None:
    """Draws every linear layer anew with deviation 1 / sqrt(fan in); positions start as two-dimensional sinusoids.

    The layers that write to the residual stream get 1 / sqrt(2 depth) of it. The classifier stays as it is.
    """
    for block in model.blocks:
        for layer in (block.attn.qkv, block.mlp.fc1, block.attn.proj, block.mlp.fc2):
            nn.init.normal_(layer.weight, std=layer.in_features**-0.5)
            nn.init.zeros_(layer.bias)
        for layer in (block.attn.proj, block.mlp.fc2):
            layer.weight.mul_((2 * len(model.blocks)) ** -0.5)
    if isinstance(model.patch_embed, ConvStem):
        model.patch_embed.initialise()
    else:
        kernel = model.patch_embed.proj.weight  # [C, 3, P, P]
        nn.init.normal_(kernel, std=kernel[0].numel() ** -0.5)
        nn.init.zeros_(model.patch_embed.proj.bias)
    model.pos_embed.zero_()  # [1, 1 + N, C]
    positions = grid_sinusoids(model.patch_embed.grid_size[0], model.embed_dim)  # [N, C]
    model.pos_embed[:, model.num_prefix_tokens :] = POSITION_STD * positions


@torch.no_grad()
def mimic_trained_attention(model: VisionTransformer) -> None:
    """`scale_with_width`, with attention as in trained models."""
    scale_with_width(model)
    for block in model.blocks:
        query, key, value, output = mimetic_attention(model.embed_dim, block.attn.num_heads)
        block.attn.qkv.weight.copy_(torch.cat([query, key, value]))
        block.attn.proj.weight.copy_(output)


def mimetic_attention(width: int, heads: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Weights of the query, key, value and output layers, each [width, width] as `nn.Linear` keeps them.

    Draws from torch's generator of the host.
    """
    queries, keys = [], []
    for _ in range(heads):
        left, right = halves(_noisy_identity(width, QK_IDENTITY, QK_NOISE), width // heads)
        queries.append(left.T)
        keys.append(right)
    output, value = halves(_noisy_identity(width, VO_IDENTITY, VO_NOISE), width)
    return torch.cat(queries), torch.cat(keys), value, output


def halves(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """[C, rank] and [rank, C] whose product is the best approximation of `matrix` [C, C] of that rank."""
    u, s, v = torch.linalg.svd(matrix)
    root = s[:rank].sqrt()
    return u[:, :rank] * root, root[:, None] * v[:rank]


def grid_sinusoids(side: int, width: int) -> Tensor:
    """Positions [side * side, width] of a square grid in reading order, with deviation 1: half for each axis."""
    frequency = _WAVELENGTH ** -(torch.arange(width // 4) / (width // 4))  # [C / 4]
    angle = torch.arange(side)[:, None] * frequency  # [S, C / 4]
    axis = torch.cat([angle.sin(), angle.cos()], dim=1)  # [S, C / 2]
    rows, columns = axis[:, None].expand(side, side, -1), axis[None].expand(side, side, -1)
    positions = torch.zeros(side * side, width)
    positions[:, : 4 * (width // 4)] = torch.cat([rows, columns], dim=2).reshape(side * side, -1)
    return positions / positions.std()


def _noisy_identity(width: int, identity: float, noise: float) -> Tensor:
    return identity * torch.eye(width) + noise * torch.randn(width, width) / width**0.5
