"""Where the visible and the hidden tokens of a batch stand under several masks a sample; made on the host."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from common.device import to_device
from data2vec.model.encoder import Rows
from data2vec.model.text_model import rows_of


@dataclass
class MaskPlan:
    """B samples of T tokens under M masks each; places count through [B, T], or through the masked rows [B * M, T]."""

    masks: int  # M
    visible: Rows  # of the masked rows; `slot` counts through [B * M, K], K visible tokens a row
    source: Tensor  # int64 [V], the visible ones' places in [B, T]
    key_mask: Tensor | None  # bool [B * M, K], False where a row has fewer than K; None where none has
    hidden: Tensor  # int64 [N], the hidden ones' places in the masked rows
    target: Tensor  # int64 [N], their places in [B, T]

    def to(self, device: torch.device) -> MaskPlan:
        visible = Rows(to_device(self.visible.flat, device), to_device(self.visible.slot, device), self.visible.width)
        key_mask = None if self.key_mask is None else to_device(self.key_mask, device)
        places = (to_device(t, device) for t in (self.source, self.hidden, self.target))
        source, hidden, target = places
        return MaskPlan(self.masks, visible, source, key_mask, hidden, target)

    def take_visible(self, x: Tensor) -> Tensor:
        """[B, T, C] -> the visible ones of each masked row, [B * M, K, C]; 0 where a row has fewer."""
        rows = len(x) * self.masks
        found = x.flatten(0, 1).index_select(0, self.source)  # [V, C]
        if self.key_mask is None:
            return found.view(rows, -1, x.shape[2])
        y = found.new_zeros(rows * self.visible.width, x.shape[2])
        return y.index_copy(0, self.visible.slot, found).view(rows, -1, x.shape[2])

    def put_visible(self, x: Tensor, canvas: Tensor) -> Tensor:
        """The inverse: states [B * M, K, C] onto their places in `canvas` [B * M, T, C]."""
        found = x.flatten(0, 1)  # [B * M * K, C]
        if self.key_mask is not None:
            found = found.index_select(0, self.visible.slot)  # [V, C]
        return canvas.flatten(0, 1).index_copy(0, self.visible.flat, found).view_as(canvas)


def plan_masks(hidden: Tensor, real: Tensor | None = None) -> MaskPlan:
    """
    Args:
        hidden: bool [B, M, T], True at tokens to hide and predict.
        real: bool [B, T], False at padding, which is neither visible nor hidden; None where there is none.
    """
    batch, masks, length = hidden.shape
    visible = ~hidden
    if real is not None:
        hidden, visible = hidden & real[:, None], visible & real[:, None]
    visible = visible.flatten(0, 1)  # [B * M, T]
    rows = rows_of(visible, visible, 1)
    key_mask = None
    if len(rows.flat) < batch * masks * rows.width:
        key_mask = torch.zeros(batch * masks * rows.width, dtype=torch.bool)
        key_mask = key_mask.index_fill(0, rows.slot, True).view(batch * masks, rows.width)
    places = hidden.flatten().nonzero().squeeze(1)

    def within_samples(flat: Tensor) -> Tensor:
        return flat // (masks * length) * length + flat % length

    return MaskPlan(masks, rows, within_samples(rows.flat), key_mask, places, within_samples(places))
