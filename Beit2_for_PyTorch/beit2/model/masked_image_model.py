"""The masked image model of BEiT v2 (Peng et al. 2022, sections 2.2 and 2.3; reference `modeling_pretrain.py`)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from beit2.model.blocks import Attention, Block, RelativePositionBias, drop_path_rates, init_linear_and_norm, take_rows
from beit2.model.encoder import Encoder


class MaskedImageModel(Encoder):
    """Predicts the visual tokens of masked patches; with `cls_pt`, also through a shallow head fed by the final CLS.

    The head (section 2.3, "patch aggregation") gets the patch states of block `early_layers` and the final CLS token,
    so that the CLS token has to carry what the early patch states lack.

    Args:
        early_layers: number of the block whose patch states the head sees.
        head_layers: blocks in the head.
        shared_lm_head: one norm and one output layer for both predictions.
        cls_pt: whether there is a head; by default when early_layers is given.
        init_cls_pt_layers: initialise the head's blocks as all others. The reference builds them after its
            initialisation ran, so they keep torch's default; False is its published behaviour.
        encoder: the arguments of `Encoder`.
    """

    def __init__(
        self,
        vocab_size: int = 8192,
        early_layers: int | None = None,
        head_layers: int = 2,
        shared_lm_head: bool = True,
        cls_pt: bool | None = None,
        init_cls_pt_layers: bool = False,
        depth: int = 12,
        drop_path_rate: float = 0.0,
        **encoder: Any,
    ):
        super().__init__(depth=depth, drop_path_rate=drop_path_rate, mask_token=True, **encoder)
        self.cls_pt = early_layers is not None if cls_pt is None else cls_pt
        self.early_layers = (6 if early_layers is None else early_layers) if self.cls_pt else None
        if self.cls_pt and not 1 <= self.early_layers <= depth:
            raise ValueError(f"early_layers {self.early_layers}: must be between 1 and the model's depth, {depth}")
        self.activation_checkpointing = False  # recompute blocks in the backward pass
        self.vocab_size, self.init_cls_pt_layers = vocab_size, init_cls_pt_layers
        self.norm = nn.LayerNorm(self.embed_dim, eps=self.norm_eps)
        self.lm_head = nn.Linear(self.embed_dim, vocab_size)
        if self.cls_pt:
            count = max(depth, self.early_layers + head_layers)
            rates = drop_path_rates(drop_path_rate, count)[self.early_layers : self.early_layers + head_layers]
            self.cls_pt_layers = self.new_blocks(rates)
            self.shared_lm_head = shared_lm_head
            if not shared_lm_head:
                self.cls_pt_norm = nn.LayerNorm(self.embed_dim, eps=self.norm_eps)
                self.cls_pt_lm_head = nn.Linear(self.embed_dim, vocab_size)
        self.init_weights()

    def init_module(self, name: str, module: nn.Module) -> None:
        bounds = {"a": -self.init_std, "b": self.init_std}
        if module is self:
            self.init_tokens(**bounds)
        elif isinstance(module, Block | Attention | RelativePositionBias):
            module.reset_parameters()
        elif name.startswith("cls_pt_layers") and not self.init_cls_pt_layers:
            if isinstance(module, nn.Linear | nn.LayerNorm):
                module.reset_parameters()
        else:
            init_linear_and_norm(module, self.init_std, bound=self.init_std, convolutions=True)
        self.scale_residual_output(name, module, first=self.early_layers or 0)

    def forward_features(
        self, images: Tensor, bool_masked_pos: Tensor | None = None, patches: Tensor | None = None
    ) -> list[Tensor]:
        """Normalised patch states, [main] or [main, head].

        Args:
            images: [B, 3, H, W].
            bool_masked_pos: bool [B, N].
            patches: int64 [B, K], the patches whose states are wanted; None = all N. The last blocks then compute
                those rows only, which changes neither the result nor a gradient.

        Returns:
            One or two tensors [B, K or N, C], without CLS.
        """
        x = self.embed(images, bool_masked_pos)  # [B, 1 + N, C]
        bias = self.shared_bias()  # [1, H, 1 + N, 1 + N]
        rows = None if patches is None else patches + 1  # 0 is CLS
        # the early states have to be whole, so the last main block is cut only when it comes after them
        cut_main = rows is not None and self.early_layers != len(self.blocks)
        early = None
        for number, block in enumerate(self.blocks, 1):
            last = cut_main and number == len(self.blocks)
            x = self._run(block, x, bias, self._with_cls(rows) if last else None)
            if number == self.early_layers:
                early = x[:, 1:]  # [B, N, C]
        main = x[:, 1:] if rows is None or cut_main else take_rows(x, rows)  # [B, K or N, C]
        if not self.cls_pt:
            return [self.norm(main)]

        y = torch.cat((x[:, :1], early), dim=1)  # [B, 1 + N, C]: final CLS, early patches
        for number, block in enumerate(self.cls_pt_layers, 1):
            y = self._run(block, y, bias, rows if number == len(self.cls_pt_layers) else None)
        if rows is None:
            y = y[:, 1:]
        elif len(self.cls_pt_layers) == 0:
            y = take_rows(y, rows)
        return [self.norm(main), (self.norm if self.shared_lm_head else self.cls_pt_norm)(y)]

    def encode(self, images: Tensor) -> Tensor:
        """Normalised states with nothing masked, CLS first: images [B, 3, H, W] -> [B, 1 + N, C]."""
        x, bias = self.embed(images), self.shared_bias()
        for block in self.blocks:
            x = self._run(block, x, bias, None)
        return self.norm(x)

    def _run(self, block: Block, x: Tensor, bias: Tensor | None, rows: Tensor | None) -> Tensor:
        if self.activation_checkpointing and torch.is_grad_enabled():
            return checkpoint(block, x, bias, rows, use_reentrant=False)
        return block(x, bias, rows)

    @staticmethod
    def _with_cls(rows: Tensor) -> Tensor:
        return torch.cat((torch.zeros_like(rows[:, :1]), rows), dim=1)  # [B, 1 + K]

    def forward(
        self,
        images: Tensor,
        bool_masked_pos: Tensor | None = None,
        return_all_tokens: bool = False,
        return_patch_tokens: bool = False,
        masked_patches: Tensor | None = None,
    ) -> Tensor | list[Tensor]:
        """Logits over the visual vocabulary.

        Args:
            images: [B, 3, H, W], normalised.
            bool_masked_pos: bool [B, N] or [B, h, w]; None = nothing masked.
            return_all_tokens: logits of all patches, [B, N, V].
            return_patch_tokens: the normalised patch states instead of logits, [B, N, C].
            masked_patches: int64 [B, K], `masked_rows(bool_masked_pos, K)`, for masks with K patches in every
                sample: spares finding them out, which waits for the device.

        Returns:
            [M, V] for the M masked patches, row-major over (sample, patch); with the CLS head a list of two, main
            first.
        """
        if bool_masked_pos is None:
            bool_masked_pos = torch.zeros(
                images.shape[0], self.patch_embed.num_patches, dtype=torch.bool, device=images.device
            )
        mask = bool_masked_pos.flatten(1).bool()  # [B, N]
        if mask.shape != (images.shape[0], self.patch_embed.num_patches):
            raise ValueError(
                f"mask of shape {tuple(bool_masked_pos.shape)}: this model cuts {images.shape[0]} images into "
                f"{self.patch_embed.num_patches} patches each (window {self.window_size})"
            )
        if return_all_tokens or return_patch_tokens:
            states = self.forward_features(images, mask)
            return self._unlist(states if return_patch_tokens else self._logits(states))
        if masked_patches is not None:
            states = self.forward_features(images, mask, masked_patches)
            return self._unlist(self._logits([s.flatten(0, 1) for s in states]))
        counts = mask.sum(dim=1)
        patches = masked_rows(mask, int(counts.max()))
        states = self.forward_features(images, mask, patches)
        filled = torch.arange(patches.shape[1], device=mask.device) < counts.unsqueeze(1)  # [B, K]: False = padding
        return self._unlist(self._logits([s[filled] for s in states]))

    def _logits(self, states: list[Tensor]) -> list[Tensor]:
        heads = [self.lm_head]
        if self.cls_pt:
            heads.append(self.lm_head if self.shared_lm_head else self.cls_pt_lm_head)
        return [head(x) for head, x in zip(heads, states, strict=True)]

    def _unlist(self, outputs: list[Tensor]) -> Tensor | list[Tensor]:
        return outputs if self.cls_pt else outputs[0]


def masked_rows(mask: Tensor, count: int) -> Tensor:
    """Indices of the first `count` True of each row, ascending: mask bool [B, N] -> int64 [B, count].

    A row with fewer is filled up with False positions. Fixed shape and no wait for the device, unlike `nonzero`.
    """
    return mask.to(torch.int32).argsort(dim=1, descending=True, stable=True)[:, :count]


def build_pretraining_model(**config) -> MaskedImageModel:
    """The model of a plain configuration (the arguments of `MaskedImageModel`)."""
    return MaskedImageModel(**config)
