"""Convolutions in the place of the patch projection, for training from scratch on few pictures.

Xiao et al., "Early convolutions help transformers see better" (arXiv:2106.14881): 3 x 3 convolutions of stride 2, each
with a norm and ReLU, then one of 1 x 1 to the width. The encoder after it is the same, with as many tokens. The norm is
over each picture alone (GroupNorm, four channels a group) where the paper has batch norm, whose result would depend on
the number of ranks and of accumulated batches.
"""

from collections.abc import Iterable

import torch
from timm.layers import PatchEmbed
from torch import nn

NORM_CHANNELS = 4  # a group of one picture's channels; one group of all learns more slowly (docs/experiments.md)


class ConvStem(PatchEmbed):
    """[B, 3, S, S] -> [B, (S / patch)^2, C], like timm's `PatchEmbed` for a patch size that is a power of two.

    The channels double from layer to layer and end at the width.
    """

    def __init__(self, img_size: int, patch_size: int, in_chans: int, embed_dim: int, **kwargs):
        super().__init__(img_size, patch_size, in_chans, embed_dim, **kwargs)
        count = int(patch_size).bit_length() - 1
        if 2**count != patch_size or count < 1:
            raise ValueError(f"a convolutional stem needs a patch size of 2, 4, 8, ..., not {patch_size}")
        layers: list[nn.Module] = []
        channels = in_chans
        for step in range(count):
            wider = embed_dim >> (count - 1 - step)
            layers += [
                nn.Conv2d(channels, wider, 3, stride=2, padding=1, bias=False),
                nn.GroupNorm(max(1, wider // NORM_CHANNELS), wider),
                nn.ReLU(),
            ]
            channels = wider
        self.proj = nn.Sequential(*layers, nn.Conv2d(channels, embed_dim, 1))

    @torch.no_grad()
    def initialise(self) -> None:
        """Weights that keep the size of signals through ReLU, and unit size at the end."""
        for layer in self.proj:
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, nonlinearity="linear" if layer.bias is not None else "relu")
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)


def patch_size_of(names: Iterable[str]) -> int:
    """The patch size of a checkpoint with this stem, from the names of its tensors: the strided layers have no bias."""
    parts = [name.rsplit(".", 1) for name in names if name.startswith("patch_embed.proj.")]
    weights, biases = ({layer for layer, kind in parts if kind == wanted} for wanted in ("weight", "bias"))
    return 2 ** len(weights - biases)
