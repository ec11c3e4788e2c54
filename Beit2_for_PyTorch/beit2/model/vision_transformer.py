"""The fine-tuning vision transformer, also encoder and decoder of the tokenizer (reference `modeling_finetune.py`)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from beit2.model.blocks import init_linear_and_norm
from beit2.model.encoder import Encoder


class VisionTransformer(Encoder):
    """BEiT encoder with a linear classifier on the mean of the patch tokens, or on CLS.

    Args:
        num_classes: 0 = no classifier, `forward` returns the pooled features.
        use_mean_pooling: mean of patch tokens, then LayerNorm `fc_norm`; else LayerNorm `norm`, then CLS.
        init_scale: factor on the classifier's initial weights.
        label_smoothing: part of a training configuration; the model itself does not use it.
        encoder: the arguments of `Encoder`.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        num_classes: int = 1000,
        use_mean_pooling: bool = True,
        init_scale: float = 0.001,
        label_smoothing: float = 0.0,
        use_abs_pos_emb: bool = True,
        **encoder: Any,
    ):
        super().__init__(img_size, patch_size, use_abs_pos_emb=use_abs_pos_emb, **encoder)
        self.num_classes, self.label_smoothing, self.init_scale = num_classes, label_smoothing, init_scale
        self.norm = nn.Identity() if use_mean_pooling else nn.LayerNorm(self.embed_dim, eps=self.norm_eps)
        self.fc_norm = nn.LayerNorm(self.embed_dim, eps=self.norm_eps) if use_mean_pooling else None
        self.head = nn.Linear(self.embed_dim, num_classes) if num_classes > 0 else nn.Identity()
        self.init_weights()

    @torch.no_grad()
    def init_module(self, name: str, module: nn.Module) -> None:
        """As the reference; the patch convolution keeps torch's own."""
        if module is self:
            self.init_tokens()
        init_linear_and_norm(module, self.init_std, bound=2.0, convolutions=False)
        self.scale_residual_output(name, module)
        if name == "head" and self.num_classes > 0:
            module.weight.mul_(self.init_scale)

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
        x, bias = self.embed(images), self.shared_bias()
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
        return self.head(self.forward_features(images, return_patch_tokens, return_all_tokens))

    def get_intermediate_layers(self, images: Tensor) -> list[Tensor]:
        """The output of every block, [B, 1 + N, C] each, for the linear probe."""
        x, bias = self.embed(images), self.shared_bias()
        outputs = []
        for block in self.blocks:
            x = block(x, bias)
            outputs.append(x)
        return outputs


def build_classifier(**config) -> VisionTransformer:
    """The fine-tuning model of a plain configuration (the arguments of `VisionTransformer`)."""
    return VisionTransformer(**config)
