"""What differs between text and pictures: how tokens are made and where they stand; and the parts around the blocks."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data2vec.model.encoder import EncoderConfig, TokenEmbedding
from data2vec.model.multi.block import BlockConfig, stack
from data2vec.model.multi.decoder import Decoder, DecoderConfig
from data2vec.model.multi.mask_plan import MaskPlan


@dataclass(frozen=True)
class ModalityConfig:
    """Named as in fairseq's D2vModalityConfig; the third group is of pictures alone."""

    prenet_depth: int = 4
    prenet_dropout: float = 0.0
    start_drop_path_rate: float = 0.0
    end_drop_path_rate: float = 0.0
    num_extra_tokens: int = 0
    init_extra_token_zero: bool = True
    mask_noise_std: float = 0.01
    ema_local_encoder: bool = False

    max_source_positions: int = 512
    dropout: float = 0.1
    no_scale_embedding: bool = True
    layernorm_embedding: bool = True

    input_size: int = 224
    in_chans: int = 3
    patch_size: int = 16

    decoder: DecoderConfig = field(default_factory=DecoderConfig)


class ContextEncoder(nn.Module):
    """The first blocks, of one modality; the model's own come after them (fairseq BlockEncoder)."""

    def __init__(self, config: ModalityConfig, block: BlockConfig, has_norm: bool):
        super().__init__()
        rates = config.start_drop_path_rate, config.end_drop_path_rate
        self.blocks = stack(block, config.prenet_depth, *rates)
        self.norm = block.norm() if has_norm and not block.layer_norm_first else None
        self.dropout = nn.Dropout(config.prenet_dropout)

    def forward(self, x: Tensor, key_mask: Tensor | None) -> Tensor:
        x = self.dropout(x if self.norm is None else self.norm(x))
        for block in self.blocks:
            x, _ = block.run(x, key_mask)  # [B, T, C]
        return x


class ModalityEncoder(nn.Module):
    """Local features -> visible tokens with extra ones in front -> first blocks; and the decoder.

    A subclass defines `local_encoder` and `local_features`.

    Args:
        dims: of the decoder's convolution.
        has_norm: whether a norm stands before the first blocks.
    """

    def __init__(self, config: ModalityConfig, block: BlockConfig, dims: int, has_norm: bool):
        super().__init__()
        self.config = config
        self.fixed_positional_encoder: FixedPositions | None = None
        self.extra_tokens = None
        if config.num_extra_tokens:
            self.extra_tokens = nn.Parameter(torch.zeros(1, config.num_extra_tokens, block.embed_dim))
            drawn = self.extra_tokens[:, int(config.init_extra_token_zero) :]  # the first may stay 0
            nn.init.normal_(drawn.detach())
        self.context_encoder = ContextEncoder(config, block, has_norm)
        self.decoder: Decoder | None = Decoder(config.decoder, block.embed_dim, dims)  # a teacher has none

    def local_features(self, source: Tensor) -> tuple[Tensor, Tensor | None]:
        """(tokens without positions [B, T, C], bool [B, T] that is False at padding, None where there is none)."""
        raise NotImplementedError

    def contextualize(self, x: Tensor, real: Tensor | None, plan: MaskPlan | None) -> tuple[Tensor, Tensor | None]:
        """(states, key mask) behind the first blocks: of whole samples [B, E + T, C], or of the visible tokens of each
        masked row [B * M, E + K, C]; E extra tokens in front."""
        if self.fixed_positional_encoder is not None:
            x = x + self.fixed_positional_encoder.positions.to(x.dtype)
        key_mask = real if plan is None else plan.key_mask
        x = x if plan is None else plan.take_visible(x)  # [B * M, K, C]
        if self.extra_tokens is not None:
            x = torch.cat((self.extra_tokens.to(x.dtype).expand(len(x), -1, -1), x), dim=1)
            if key_mask is not None:
                key_mask = F.pad(key_mask, (self.config.num_extra_tokens, 0), value=True)
        return self.context_encoder(x, key_mask), key_mask

    def decoder_states(self, x: Tensor, real: Tensor | None, plan: MaskPlan, length: int) -> list[Tensor]:
        """Of each decoder layer, at the hidden tokens: [N, D] each.

        Args:
            x: the student's output, [B * M, E + K, C].
            length: T.
        """
        p, std = self.config.decoder.input_dropout, self.config.mask_noise_std
        x = F.dropout(x, p, self.training)[:, self.config.num_extra_tokens :]  # [B * M, K, C]
        canvas = x.new_zeros(len(x), length, x.shape[2])
        if self.training and std > 0:
            canvas = canvas.normal_(0, std)
        canvas = plan.put_visible(x, canvas)  # [B * M, T, C]
        if real is not None:
            real = real.repeat_interleave(plan.masks, dim=0)
            canvas = canvas * real.unsqueeze(2)
        return [y.flatten(0, 1).index_select(0, plan.hidden) for y in self.decoder(canvas, real)]


class TextEncoder(ModalityEncoder):
    """Token ids; learned positions are part of the embedding."""

    def __init__(self, config: ModalityConfig, block: BlockConfig, vocab_size: int):
        super().__init__(config, block, dims=1, has_norm=config.prenet_depth > 0)
        self.local_encoder = TokenEmbedding(
            EncoderConfig(
                vocab_size,
                block.embed_dim,
                max_source_positions=config.max_source_positions,
                dropout=config.dropout,
                layernorm_embedding=config.layernorm_embedding,
                no_scale_embedding=config.no_scale_embedding,
            )
        )

    def local_features(self, source: Tensor, has_padding: bool = False) -> tuple[Tensor, Tensor | None]:
        return self.local_encoder.embed(source, has_padding)  # int64 [B, T]


class FixedPositions(nn.Module):
    """Sines and cosines of a patch's column in the first half of the channels, of its row in the second (MAE's)."""

    def __init__(self, side: int, dim: int):
        super().__init__()
        frequencies = 10_000.0 ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))  # [C / 4]
        place = torch.arange(side, dtype=torch.float64)[:, None] * frequencies  # [S, C / 4]
        place = torch.cat((place.sin(), place.cos()), dim=1)  # [S, C / 2]
        columns, rows = place.repeat(side, 1), place.repeat_interleave(side, dim=0)  # [P, C / 2] each
        self.register_buffer("positions", torch.cat((columns, rows), dim=1).float().unsqueeze(0))


class Patches(nn.Module):
    """Non-overlapping patches through one linear map."""

    def __init__(self, config: ModalityConfig, dim: int):
        super().__init__()
        self.proj = nn.Conv2d(config.in_chans, dim, config.patch_size, stride=config.patch_size)

    def forward(self, images: Tensor) -> Tensor:
        return self.proj(images).flatten(2).transpose(1, 2)  # [B, 3, S, S] -> [B, P, C]


class ImageEncoder(ModalityEncoder):
    """Normalised pictures; positions are fixed."""

    def __init__(self, config: ModalityConfig, block: BlockConfig):
        super().__init__(config, block, dims=2, has_norm=True)
        self.local_encoder = Patches(config, block.embed_dim)
        self.fixed_positional_encoder = FixedPositions(config.input_size // config.patch_size, block.embed_dim)

    def local_features(self, source: Tensor, has_padding: bool = False) -> tuple[Tensor, None]:
        return self.local_encoder(source), None
