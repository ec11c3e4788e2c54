"""One optimizer step of pretraining, and the averages of an epoch (reference `engine_for_pretraining.py`)."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from beit2.image_data import Batch, Normalizer
from beit2.pretraining_model import masked_rows
from beit2.tokenizer import VQKD
from common import device as devices
from common import distributed

Scalars = dict[str, Tensor | float]


@dataclass
class TrainState:
    """How far the run is; saved with every checkpoint.

    Attributes:
        step: optimizer steps done.
        sums: of the current epoch's scalars, by name; kept on the device.
        counts: how many values each sum has.
    """

    step: int = 0
    sums: Scalars = field(default_factory=dict)
    counts: Scalars = field(default_factory=dict)

    def add(self, scalars: Scalars) -> None:
        """Counts a step and adds its scalars; a gradient norm that is not finite (fp16 skipped it) is left out."""
        self.step += 1
        for name, value in scalars.items():
            kept: Tensor | float = 1.0
            if isinstance(value, Tensor):
                value = value.detach().double() if value.device.type == "cpu" else value.detach().float()
                kept = value.isfinite().to(value.dtype)
                value = torch.where(value.isfinite(), value, torch.zeros_like(value))
            self.sums[name] = self.sums.get(name, 0.0) + value
            self.counts[name] = self.counts.get(name, 0.0) + kept

    def means(self) -> dict[str, float]:
        """The epoch's means so far, over all ranks."""
        totals, counts = self._over_ranks()
        return dict(zip(self.sums, (totals / counts.clamp(min=1)).tolist(), strict=True))

    def _over_ranks(self) -> tuple[Tensor, Tensor]:
        """Sums and counts, each the mean over the ranks, in the order of the names."""
        pairs = [[float(self.sums[name]), float(self.counts[name])] for name in self.sums]
        return distributed.all_reduce_mean(torch.tensor(pairs, dtype=torch.float64).view(-1, 2)).unbind(dim=1)

    def begin_epoch(self) -> None:
        self.sums, self.counts = {}, {}

    def plain(self) -> dict:
        """Numbers only, for a checkpoint that every rank continues from. Every rank calls it."""
        totals, counts = self._over_ranks()
        names = list(self.sums)
        return {
            "step": self.step,
            "sums": dict(zip(names, totals.tolist(), strict=True)),
            "counts": dict(zip(names, counts.tolist(), strict=True)),
        }


class Watch:
    """Notices losses and gradients that are not finite without making the device wait for it at each step.

    A broken gradient never reaches the weights (see `update`); `check` stops the run. Call it before every save.
    """

    def __init__(self) -> None:
        self._sum: Tensor | float = 0.0

    def add(self, scalars: Scalars, skips_allowed: bool) -> None:
        """Takes a step's scalars; under fp16 loss scaling a gradient may overflow and the step be skipped."""
        self._sum = self._sum + scalars["loss"].float() * 0  # 0, or nan from then on
        if not skips_allowed:
            self._sum = self._sum + scalars["grad_norm"].float() * 0

    def check(self, step: int) -> None:
        """Raises FloatingPointError on every rank when any rank saw one."""
        distributed.stop_if_nonfinite(self._sum, "loss or gradient", step)


def token_loss(
    model: nn.Module, tokenizer: VQKD, batch: Batch, normalizer: Normalizer, precision: str
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


def gradient_step(
    model: nn.Module,
    tokenizer: VQKD,
    normalizer: Normalizer,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    precision: str,
    clip_grad: float | None,
    batches: Sequence[Batch],
) -> Scalars:
    """Forward and backward over the micro-batches, then one update. Returns the logged scalars, on the device."""
    means: Scalars = {}
    optimizer.zero_grad(set_to_none=True)
    for number, batch in enumerate(batches, 1):
        with gradients_stay_local(model, number < len(batches)):
            loss, scalars = token_loss(model, tokenizer, batch, normalizer, precision)
            scaler.scale(loss / len(batches)).backward()
        for name, value in scalars.items():
            means[name] = means.get(name, 0.0) + value / len(batches)
    means["grad_norm"] = update(model, optimizer, scaler, clip_grad)
    means["loss_scale"] = float(scaler.get_scale())
    return means


@contextlib.contextmanager
def gradients_stay_local(model: nn.Module, local: bool):
    """Skips the gradient reduction of all but the last micro-batch, for DDP and FSDP2 alike."""
    if hasattr(model, "set_requires_gradient_sync"):
        model.set_requires_gradient_sync(not local)
        yield
    elif local and hasattr(model, "no_sync"):
        with model.no_sync():
            yield
    else:
        yield


def update(
    model: nn.Module, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, clip_grad: float | None
) -> Tensor:
    """Clips, updates, and returns the gradient norm before clipping. A gradient that is not finite changes nothing.

    Fused AdamW skips the update on the device, as fp16 loss scaling does; for other optimizers the host looks first.
    """
    if scaler.is_enabled():
        scaler.unscale_(optimizer)
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
    if clip_grad is not None:
        parameters = [p for p in model.parameters() if p.grad is not None]
        torch.nn.utils.clip_grads_with_norm_(parameters, clip_grad, norm)
    if scaler.is_enabled():
        scaler.step(optimizer)
        scaler.update()
    elif isinstance(optimizer, torch.optim.AdamW):
        optimizer.grad_scale, optimizer.found_inf = None, (~norm.isfinite()).float()
        optimizer.step()
    elif bool(norm.isfinite()):
        optimizer.step()
    return norm
