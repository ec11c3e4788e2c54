"""The loss of masked image modelling (reference `engine_for_pretraining.py`)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from beit2.data.images import Batch
from beit2.data.normalizer import Normalizer
from beit2.model.masked_image_model import masked_rows
from beit2.model.tokenizer import VQKD
from beit2.training.state import Scalars
from common import device as devices


def token_loss(
    model: nn.Module, tokenizer: VQKD, normalizer: Normalizer, precision: str, batch: Batch
) -> tuple[Tensor, Scalars]:
    """Cross-entropy of the masked patches' visual tokens, and the scalars that are logged."""
    count = int(batch.mask[0].sum())  # every sample has that many; the mask is still on the host
    mask = batch.mask.flatten(1).to(normalizer.device, non_blocking=True)  # [B, N]
    patches = masked_rows(mask, count)  # [B, K]
    images, visual = normalizer.views(batch)
    with devices.autocast(normalizer.device, precision):
        labels = tokenizer.get_codebook_indices(visual, patches).flatten()  # [B * K]
        outputs = model(images, mask, masked_patches=patches)  # [B * K, V], or two of them
    outputs = outputs if isinstance(outputs, list) else [outputs]
    losses = [F.cross_entropy(logits.float(), labels) for logits in outputs]
    accuracies = [(logits.detach().argmax(dim=-1) == labels).float().mean() for logits in outputs]
    if len(outputs) == 1:
        return losses[0], {"loss": losses[0].detach(), "mlm_acc": accuracies[0]}
    loss = losses[0] + losses[1]
    scalars: Scalars = {"mlm_acc_1": accuracies[0], "mlm_acc_2": accuracies[1]}
    scalars |= {"loss_1": losses[0].detach(), "loss_2": losses[1].detach(), "loss": loss.detach()}
    return loss, scalars
