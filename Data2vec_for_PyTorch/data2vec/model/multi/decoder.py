"""The light convolutional decoder: from visible tokens' states and noise to predictions at hidden ones."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class DecoderConfig:
    """Named as in fairseq's D2vDecoderConfig."""

    decoder_dim: int = 384
    decoder_groups: int = 16
    decoder_kernel: int = 5
    decoder_layers: int = 5
    input_dropout: float = 0.1
    decoder_residual: bool = True
    projection_layers: int = 1
    projection_ratio: float = 2.0


class Decoder(nn.Module):
    """Convolution, LayerNorm over channels and GELU, several times, over a line of tokens or a square of patches.

    Args:
        dims: 1 or 2, of the convolution.
    """

    def __init__(self, config: DecoderConfig, embed_dim: int, dims: int):
        super().__init__()
        self.config, self.dims = config, dims
        conv = nn.Conv1d if dims == 1 else nn.Conv2d
        kernel, width = config.decoder_kernel, config.decoder_dim
        # in a list each: fairseq's Sequential has the convolution first, and its other modules have no weights
        self.blocks = nn.ModuleList(
            nn.ModuleList(
                [conv(width if i else embed_dim, width, kernel, padding=kernel // 2, groups=config.decoder_groups)]
            )
            for i in range(config.decoder_layers)
        )
        self.activation = nn.GELU()
        self.proj = self._projection(embed_dim)

    def _projection(self, embed_dim: int) -> nn.Module:
        layers: list[nn.Module] = []
        width = self.config.decoder_dim
        for i in range(self.config.projection_layers - 1 if self.dims == 1 else 0):
            wider = int(width * self.config.projection_ratio) if i == 0 else width
            layers += [nn.Linear(width, wider), nn.GELU()]
            width = wider
        layers.append(nn.Linear(width, embed_dim))
        return nn.Sequential(*layers) if len(layers) > 1 else layers[0]

    def forward(self, x: Tensor, real: Tensor | None) -> list[Tensor]:
        """Each layer's states, [B, T, D]; `self.proj` of the last makes predictions.

        Args:
            x: [B, T, C].
            real: bool [B, T], False at padding, which stays 0 as if the row ended; None where there is none.
        """
        states = []
        for (conv,) in self.blocks:
            y = self._convolve(conv, x)  # [B, T, D]
            y = self.activation(F.layer_norm(y, y.shape[-1:]))
            if self.config.decoder_residual and y.shape == x.shape:
                y = y + x
            x = y if real is None else y * real.unsqueeze(2)
            states.append(x)
        return states

    def _convolve(self, conv: nn.Module, x: Tensor) -> Tensor:
        length = x.shape[1]
        x = x.transpose(1, 2)  # [B, C, T]
        if self.dims == 1:
            return conv(x)[..., :length].transpose(1, 2)  # an even kernel gives one too many
        side = round(length**0.5)
        y = conv(x.unflatten(2, (side, side)))[..., :side, :side]  # [B, D, S, S]
        return y.flatten(2).transpose(1, 2)
