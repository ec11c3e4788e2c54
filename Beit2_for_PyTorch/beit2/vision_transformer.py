"""The fine-tuning vision transformer, also encoder and decoder of the tokenizer (reference `modeling_finetune.py`)."""

from __future__ import annotations

import torch
from timm.layers import PatchEmbed, trunc_normal_
from torch import Tensor, nn

from beit2.blocks import (
    NORM_EPS,
    Block,
    RelativePositionBias,
    drop_path_rates,
    init_linear_and_norm,
    scale_residual_outputs,
)
from common.cpu_kernels import cpu_kernels


class VisionTransformer(nn.Module):
    """BEiT encoder with a linear classifier on the mean of the patch tokens, or on CLS.

    Args:
        num_classes: 0 = no classifier, `forward` returns the pooled features.
        use_mean_pooling: mean of patch tokens, then LayerNorm `fc_norm`; else LayerNorm `norm`, then CLS.
        init_scale: factor on the classifier's initial weights.
        label_smoothing: part of a training configuration; the model itself does not use it.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        norm_eps: float = NORM_EPS,
        init_values: float | None = None,
        use_abs_pos_emb: bool = True,
        use_rel_pos_bias: bool = False,
        use_shared_rel_pos_bias: bool = False,
        use_mean_pooling: bool = True,
        init_scale: float = 0.001,
        init_std: float = 0.02,
        label_smoothing: float = 0.0,
    ):
        super().__init__()
        self.embed_dim, self.num_classes, self.label_smoothing = embed_dim, num_classes, label_smoothing
        self.use_rel_pos_bias = use_rel_pos_bias
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.patch_embed = PatchEmbed(img_size, patch_size, in_chans, embed_dim)
        self.patch_size = self.patch_embed.patch_size
        self.window_size = self.patch_embed.grid_size
        length = self.patch_embed.num_patches + 1
        self.pos_embed = nn.Parameter(torch.zeros(1, length, embed_dim)) if use_abs_pos_emb else None
        self.pos_drop = nn.Dropout(drop_rate)
        self.rel_pos_bias = RelativePositionBias(self.window_size, num_heads) if use_shared_rel_pos_bias else None
        window = self.window_size if use_rel_pos_bias else None
        sizes = (embed_dim, num_heads, mlp_ratio, qkv_bias, qk_scale)
        self.blocks = nn.ModuleList(
            Block(*sizes, drop_rate, attn_drop_rate, rate, init_values, window, norm_eps=norm_eps)
            for rate in drop_path_rates(drop_path_rate, depth)
        )
        self.norm = nn.Identity() if use_mean_pooling else nn.LayerNorm(embed_dim, eps=norm_eps)
        self.fc_norm = nn.LayerNorm(embed_dim, eps=norm_eps) if use_mean_pooling else None
        self.head = nn.Linear(embed_dim, num_classes) if num_classes > 0 else nn.Identity()
        self.init_std, self.init_scale = init_std, init_scale
        self.init_weights()

    def init_weights(self) -> None:
        """The reference's initialisation; the patch convolution keeps torch's own."""
        for token in (self.cls_token, self.pos_embed):
            if token is not None:
                trunc_normal_(token, std=self.init_std)
        for module in self.modules():
            init_linear_and_norm(module, self.init_std, bound=2.0, convolutions=False)
        scale_residual_outputs(self.blocks)
        if self.num_classes > 0:
            with torch.no_grad():
                self.head.weight.mul_(self.init_scale)

    def no_weight_decay(self) -> set[str]:
        return {"pos_embed", "cls_token"}

    def _embed(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """[B, 1 + N, C] and the shared bias."""
        with cpu_kernels():
            x = self.patch_embed(images)  # [B, N, C]
        x = torch.cat((self.cls_token.expand(x.shape[0], -1, -1), x), dim=1)  # [B, 1 + N, C]
        if self.pos_embed is not None:
            x = x + self.pos_embed
        return self.pos_drop(x), self.rel_pos_bias() if self.rel_pos_bias is not None else None

    def forward_features(
        self,
        images: Tensor,
        return_patch_tokens: bool = False,
        return_all_tokens: bool = False,
        patches: Tensor | None = None,
    ) -> Tensor:
        """Pooled features [B, C], or normalised tokens.

        Args:
            images: [B, in_chans, H, W].
            return_patch_tokens: [B, N, C]; only the patches int64 [B, K] when given: [B, K, C].
            return_all_tokens: [B, 1 + N, C], CLS first.
        """
        x, bias = self._embed(images)
        rows = None  # of the last block
        if return_patch_tokens and patches is not None:
            rows = patches + 1
        elif self.fc_norm is None and not return_patch_tokens and not return_all_tokens:
            rows = torch.zeros(x.shape[0], 1, dtype=torch.int64, device=x.device)  # CLS alone
        for number, block in enumerate(self.blocks, 1):
            x = block(x, bias, rows if number == len(self.blocks) else None)
        x = self.norm(x)
        if return_patch_tokens and rows is None:
            x = x[:, 1:]
        elif not return_patch_tokens and not return_all_tokens:
            x = x[:, 0] if self.fc_norm is None else x[:, 1:].mean(dim=1)  # [B, C]
        return x if self.fc_norm is None else self.fc_norm(x)

    def forward(self, images: Tensor, return_patch_tokens: bool = False, return_all_tokens: bool = False) -> Tensor:
        """images [B, in_chans, H, W] -> logits [B, num_classes] (or of every token)."""
        features = self.forward_features(images, return_patch_tokens, return_all_tokens)
        with cpu_kernels():
            return self.head(features)

    def get_intermediate_layers(self, images: Tensor) -> list[Tensor]:
        """The output of every block, [B, 1 + N, C] each, for the linear probe."""
        x, bias = self._embed(images)
        outputs = []
        for block in self.blocks:
            x = block(x, bias)
            outputs.append(x)
        return outputs


def build_classifier(**config) -> VisionTransformer:
    """The fine-tuning model of a plain configuration (the arguments of `VisionTransformer`)."""
    return VisionTransformer(**config)
