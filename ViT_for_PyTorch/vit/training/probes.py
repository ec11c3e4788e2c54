"""What a backbone's features are worth without training it: nearest neighbours, and a linear classifier on top.

k-NN as DINO's eval_knn.py (Caron et al., 2021): the k most similar training pictures by cosine vote, each with weight
exp(similarity / T). Linear: logistic regression by L-BFGS on standardised features, with the weight decay that does
best on every tenth training picture; no augmentation, so it is a lower bound of what fine-tuning a head gives. Both
are exact on any number of ranks: each keeps its share of the training pictures.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from common import device as devices
from common.distributed import World, all_reduce_sum, gather_objects
from vit.config.run_config import KnnConfig
from vit.data.loader import Batch, to_model_input
from vit.model.vision_transformer import ClassifyingViT
from vit.training.class_report import ClassTally
from vit.training.evaluate import Score
from vit.training.metrics import topk_correct

ASKED_AT_ONCE = 1024  # pictures; bounds the similarities held in memory
WEIGHT_DECAYS = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
HELD_OUT_EVERY = 10
LBFGS_STEPS = 200


class Features(NamedTuple):
    """float32 [N, D] and class indices [N], on the device."""

    values: Tensor
    targets: Tensor


@torch.no_grad()
def features(model: ClassifyingViT, batches: Iterable[Batch], world: World, precision: str) -> Features:
    """What the model's head would see of this rank's pictures."""
    found, targets = [torch.zeros(0, model.embed_dim, device=world.device)], []
    for batch in batches:
        images, target = to_model_input(batch, world.device, model.config)  # [B, 3, H, W], [B]
        with devices.autocast(world.device, precision):
            pooled = model.forward_head(model.forward_features(images), pre_logits=True)  # [B, D]
        found.append(pooled.float())
        targets.append(target)
    values = torch.cat(found)
    if not bool(values.isfinite().all()):
        raise FloatingPointError(
            "the features of some pictures are inf or nan: --load_checkpoint is damaged, or needs --precision fp32"
        )
    return Features(values, torch.cat([torch.zeros(0, dtype=torch.int64, device=world.device), *targets]))


def of_all_ranks(own: Features, world: World) -> Features:
    """The features of all ranks' pictures, on every rank."""
    parts = gather_objects(Features(own.values.cpu(), own.targets.cpu()))
    values, targets = (torch.cat(columns).to(world.device) for columns in zip(*parts, strict=True))
    return Features(values, targets)


def nearest_neighbours(
    own: Features, asked: Features, classes: int, options: KnnConfig, world: World
) -> tuple[Tensor, str]:
    """Votes [N, C] of the training pictures of all ranks, and a sentence on how they were got."""
    known = F.normalize(own.values, dim=1)
    k = min(options.neighbours, len(known))
    similar, voters = [], []
    for chunk in F.normalize(asked.values, dim=1).split(ASKED_AT_ONCE):
        best = (chunk @ known.T).topk(k, dim=1)  # [n, k]
        similar.append(best.values.cpu())
        voters.append(own.targets[best.indices].cpu())
    everyones = gather_objects((torch.cat(similar), torch.cat(voters)))
    similarity, labels = (torch.cat(columns, dim=1) for columns in zip(*everyones, strict=True))  # [N, k x ranks]
    best = similarity.topk(min(options.neighbours, similarity.shape[1]), dim=1)  # [N, k]
    weights = (best.values / options.temperature).exp()
    votes = torch.zeros(len(weights), classes).scatter_add_(1, labels.gather(1, best.indices), weights)  # [N, C]
    return votes.to(world.device), f"k-NN: {best.values.shape[1]} neighbours, temperature {options.temperature:g}"


def linear(own: Features, asked: Features, classes: int, world: World) -> tuple[Tensor, str]:
    """Logits [N, C] of a linear classifier of the training pictures of all ranks, and a sentence on it."""
    count = all_reduce_sum(torch.tensor(len(own.values), device=world.device))
    mean = all_reduce_sum(own.values.sum(0)) / count  # [D]
    deviation = (all_reduce_sum(((own.values - mean) ** 2).sum(0)) / count).sqrt().clamp(min=1e-6)  # [D]
    x, asked_x = ((part.values - mean) / deviation for part in (own, asked))
    held_out = torch.arange(len(x), device=world.device) % HELD_OUT_EVERY == 0
    tried = {}
    for decay in WEIGHT_DECAYS:
        weights = _logistic_regression(x[~held_out], own.targets[~held_out], classes, decay)
        hits = topk_correct(F.linear(x[held_out], *weights), own.targets[held_out])
        tried[decay] = int(all_reduce_sum(hits)[0])
    decay = max(tried, key=lambda value: (tried[value], value))  # of equals the strongest
    weights = _logistic_regression(x, own.targets, classes, decay)
    return F.linear(asked_x, *weights), f"linear: weight decay {decay:g}, chosen on a tenth of the training pictures"


def _logistic_regression(x: Tensor, target: Tensor, classes: int, decay: float) -> tuple[Tensor, Tensor]:
    """Weight [C, D] and bias [C] that minimise mean cross entropy + decay / 2 x |weight|^2 over all ranks' x [n, D]."""
    weight = torch.zeros(classes, x.shape[1], device=x.device, requires_grad=True)
    bias = torch.zeros(classes, device=x.device, requires_grad=True)
    count = all_reduce_sum(torch.tensor(float(len(x)), device=x.device))
    optimizer = torch.optim.LBFGS(
        [weight, bias], max_iter=LBFGS_STEPS, history_size=10, line_search_fn="strong_wolfe", tolerance_grad=1e-5
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(F.linear(x, weight, bias), target, reduction="sum") / count
        loss.backward()
        for parameter in (weight, bias):
            parameter.grad = all_reduce_sum(parameter.grad)
        weight.grad += decay * weight.detach()
        return all_reduce_sum(loss.detach()) + decay / 2 * weight.detach().square().sum()

    optimizer.step(closure)
    return weight.detach(), bias.detach()


def score(logits: Tensor, asked: Features, with_loss: bool) -> tuple[Score, ClassTally | None]:
    """Counts of all ranks' pictures, which every rank has: nothing is added up."""
    top1, top5, count = topk_correct(logits, asked.targets).tolist()
    tally = ClassTally.of(logits.shape[1], logits.device)
    if tally is not None:
        tally.add(logits, asked.targets)
    loss = F.cross_entropy(logits, asked.targets).item() if with_loss else None
    return Score(top1, top5, count, loss), tally
