"""Evaluation on a split: in-batch loss and retrieval from features computed once for each picture and each caption."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.utils.data import DataLoader, Subset
from transformers import PreTrainedModel

from clip_pretraining.data.batches import one_thread
from clip_pretraining.data.pairs import ImageSource, Pairs
from clip_pretraining.data.tokenization import PackedCaptions, pad_captions
from clip_pretraining.evaluation.retrieval import recall_at_k
from clip_pretraining.model import loss as losses
from clip_pretraining.model.loading import ImageSettings, encode_images, encode_texts
from common import distributed
from common.device import autocast, pins_memory
from common.distributed import World
from common.run.preemption import stop_if_asked, until_asked


@dataclass(frozen=True)
class Encoder:
    """A model with all that turns pictures and captions into its features."""

    model: PreTrainedModel
    settings: ImageSettings
    pad_token_id: int
    max_length: int
    world: World
    precision: str = "fp32"
    batch_size: int = 64
    workers: int = 0

    @torch.no_grad()
    def images(self, source: ImageSource) -> torch.Tensor:
        """L2-normalised features [I, d] of all pictures, on every rank; each rank encodes its share."""
        mine = range(self.world.rank, len(source), self.world.size)
        loader = DataLoader(
            Subset(source, mine),
            batch_size=self.batch_size,
            num_workers=min(self.workers, max(1, len(mine) // self.batch_size)) if self.workers else 0,
            worker_init_fn=one_thread,
            pin_memory=pins_memory(self.world.device),
        )
        device = self.world.device
        mean, std = torch.tensor(self.settings.mean, device=device), torch.tensor(self.settings.std, device=device)
        parts = []
        for pixels in until_asked(loader):
            with autocast(device, self.precision):
                parts.append(
                    encode_images(self.model, normalise_pixels(pixels.to(device, non_blocking=True), mean, std))
                )
        return self._all_ranks(parts, list(mine), len(source))

    @torch.no_grad()
    def texts(self, tokens: PackedCaptions) -> torch.Tensor:
        """L2-normalised features [T, d] of all captions, on every rank; similar lengths share a batch."""
        by_length = np.argsort(np.diff(tokens.offsets), kind="stable")[self.world.rank :: self.world.size]
        parts = []
        for start in until_asked(range(0, len(by_length), self.batch_size)):
            rows = [tokens[i] for i in by_length[start : start + self.batch_size]]
            batch = pad_captions(rows, self.pad_token_id, self.max_length)
            batch = {key: value.to(self.world.device, non_blocking=True) for key, value in batch.items()}
            with autocast(self.world.device, self.precision):
                parts.append(encode_texts(self.model, **batch))
        return self._all_ranks(parts, by_length.tolist(), len(tokens))

    def _all_ranks(self, parts: list[torch.Tensor], rows: Sequence[int], total: int) -> torch.Tensor:
        """Every rank's rows in one tensor: each adds its own to zeros. Interrupted where any was asked to stop."""
        stop_if_asked()
        features = torch.zeros(total, self.model.config.projection_dim, device=self.world.device)
        if parts:
            features[torch.as_tensor(rows, device=features.device)] = torch.cat(parts)
        return distributed.all_reduce_sum(features)


def normalise_pixels(pixels: torch.Tensor, mean: torch.Tensor, std: torch.Tensor) -> torch.Tensor:
    """uint8 [B, 3, S, S] to float32 of zero mean and unit deviation, on the device: a quarter of the bytes to copy."""
    scale = (1 / (255 * std)).view(1, 3, 1, 1)
    return torch.addcmul((-mean / std).view(1, 3, 1, 1), pixels.float(), scale)  # [B, 3, S, S]


@torch.no_grad()
def in_batch_loss(
    image: torch.Tensor, text: torch.Tensor, model: PreTrainedModel, batch_size: int, drop_last: bool
) -> float:
    """Mean loss over batches of `batch_size` consecutive pairs, each batch alone with its negatives.

    Depends on the batch size (chance is its logarithm) and on the order of the split, but not on the number of ranks.

    Args:
        image, text: [T, d] features, row i of one belongs to row i of the other.
        drop_last: leave out the last, smaller batch; otherwise it counts by its size.
    """
    bias = getattr(model, "logit_bias", None)
    total, count = 0.0, 0
    for start in range(0, len(text), batch_size):
        rows = slice(start, start + batch_size)
        size = len(text[rows])
        if size < batch_size and drop_last and count:
            break
        if bias is None:
            value = losses.contrastive_loss(image[rows], text[rows], model.logit_scale, scope="local")
        else:
            value = losses.siglip_loss(image[rows], text[rows], model.logit_scale, bias, scope="local")
        total, count = total + float(value) * size, count + size
    return total / count


@torch.no_grad()
def evaluate_split(
    encoder: Encoder, pairs: Pairs, tokens: PackedCaptions, images: ImageSource, batch_size: int, drop_last: bool
) -> tuple[dict[str, float], torch.Tensor, torch.Tensor]:
    """Loss and retrieval of a split; also the features, for the picture of queries and answers.

    Returns:
        (metrics, image features [I, d], text features [T, d])

    Raises:
        ImageError: a picture that could be read when the run began no longer can.
    """
    was_training = encoder.model.training
    encoder.model.eval()
    try:
        image, text = encoder.images(images), encoder.texts(tokens)
    finally:
        encoder.model.train(was_training)
    if not bool(torch.isfinite(image).all() & torch.isfinite(text).all()):
        raise FloatingPointError(
            "evaluation: the model's features are not finite: try --precision fp32, or take an earlier checkpoint"
        )
    owner = torch.from_numpy(pairs.image_of_caption.astype(np.int64)).to(image.device)
    metrics = {
        "loss": in_batch_loss(image[owner], text, encoder.model, batch_size, drop_last),
        "batch_size": batch_size,
        "samples": len(pairs),
        "images": len(pairs.images),
        **recall_at_k(image, text, owner, tie_share=0.5),
        "logit_scale": float(encoder.model.logit_scale.exp()),
    }
    return metrics, image, text
