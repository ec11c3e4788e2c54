"""What the pretraining and the fine-tuning model share: embedding, positions, blocks, and their initialisation."""

from __future__ import annotations

import math
import re

import torch
from timm.layers import PatchEmbed, trunc_normal_
from torch import Tensor, nn

from beit2.model.blocks import NORM_EPS, Block, RelativePositionBias, drop_path_rates

_WRITES_TO_RESIDUAL = re.compile(r"(blocks|cls_pt_layers)\.(\d+)\.(attn\.proj|mlp\.fc2)")


class Encoder(nn.Module):
    """Patch embedding, tokens, positions and `depth` blocks.

    Args:
        img_size: pixels, int or (height, width).
        use_abs_pos_emb: a learned position for CLS and every patch.
        use_rel_pos_bias: a table of relative positions in every block.
        use_shared_rel_pos_bias: one table for all blocks.
        init_std: of the initial weights.
        mask_token: whether there is one.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        attn_head_dim: int | None = None,
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        norm_eps: float = NORM_EPS,
        init_values: float | None = None,
        use_abs_pos_emb: bool = False,
        use_rel_pos_bias: bool = False,
        use_shared_rel_pos_bias: bool = False,
        init_std: float = 0.02,
        mask_token: bool = False,
    ):
        super().__init__()
        self.embed_dim, self.norm_eps, self.init_std = embed_dim, norm_eps, init_std
        self.use_rel_pos_bias = use_rel_pos_bias
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.mask_token = nn.Parameter(torch.zeros(1, 1, embed_dim)) if mask_token else None
        self.patch_embed = PatchEmbed(img_size, patch_size, in_chans, embed_dim)
        self.patch_size = self.patch_embed.patch_size
        self.window_size = self.patch_embed.grid_size
        length = self.patch_embed.num_patches + 1
        self.pos_embed = nn.Parameter(torch.zeros(1, length, embed_dim)) if use_abs_pos_emb else None
        self.pos_drop = nn.Dropout(drop_rate)
        self.rel_pos_bias = RelativePositionBias(self.window_size, num_heads) if use_shared_rel_pos_bias else None
        self._block_options = {
            "dim": embed_dim,
            "num_heads": num_heads,
            "mlp_ratio": mlp_ratio,
            "qkv_bias": qkv_bias,
            "qk_scale": qk_scale,
            "drop": drop_rate,
            "attn_drop": attn_drop_rate,
            "init_values": init_values,
            "window_size": self.window_size if use_rel_pos_bias else None,
            "attn_head_dim": attn_head_dim,
            "norm_eps": norm_eps,
        }
        self.blocks = self.new_blocks(drop_path_rates(drop_path_rate, depth))

    def new_blocks(self, drop_path: list[float]) -> nn.ModuleList:
        """Blocks of this encoder's shape, one for each of the stochastic depth rates."""
        return nn.ModuleList(Block(**self._block_options, drop_path=rate) for rate in drop_path)

    def init_weights(self) -> None:
        """The reference's initialisation; on parameters that are already there."""
        for name, module in self.named_modules():
            self.init_module(name, module)

    def init_module(self, name: str, module: nn.Module) -> None:
        """Initialises the parameters and buffers that belong to this one module, `name` in this model, itself."""
        raise NotImplementedError

    @torch.no_grad()
    def scale_residual_output(self, name: str, module: nn.Module, first: int = 0) -> None:
        """Divides a weight that writes to the residual stream by sqrt(2 * layer number) (BEiT, section 2.5).

        first: number of the layer that cls_pt_layers follow.
        """
        if match := _WRITES_TO_RESIDUAL.fullmatch(name):
            number = int(match[2]) + 1 + (first if match[1] == "cls_pt_layers" else 0)
            module.weight.div_(math.sqrt(2.0 * number))

    def init_tokens(self, **bounds: float) -> None:
        """Truncated normal CLS and mask tokens and positions."""
        for token in (self.cls_token, self.mask_token, self.pos_embed):
            if token is not None:
                trunc_normal_(token, std=self.init_std, **bounds)

    def no_weight_decay(self) -> set[str]:
        return {"pos_embed", "cls_token"}

    def embed(self, images: Tensor, mask: Tensor | None = None) -> Tensor:
        """images [B, in_chans, H, W] -> [B, 1 + N, C], CLS first; mask bool [B, N]: True = the mask token instead."""
        x = self.patch_embed(images)  # [B, N, C]
        if mask is not None:
            weight = mask.flatten(1).unsqueeze(-1).float()  # [B, N, 1]; so the residual stream begins in fp32
            x = x * (1 - weight) + self.mask_token * weight
        x = torch.cat((self.cls_token.expand(x.shape[0], -1, -1), x), dim=1)  # [B, 1 + N, C]
        if self.pos_embed is not None:
            x = x + self.pos_embed
        return self.pos_drop(x)

    def shared_bias(self) -> Tensor | None:
        """The bias for all blocks, [1, H, 1 + N, 1 + N], where there is one."""
        return self.rel_pos_bias() if self.rel_pos_bias is not None else None
