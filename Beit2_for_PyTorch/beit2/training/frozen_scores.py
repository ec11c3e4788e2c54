"""What frozen features are worth: k nearest neighbours and a linear classifier, both without any draw."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

NEIGHBOURS, TEMPERATURE = 20, 0.07  # DINO's (Caron et al. 2021, appendix)
_QUERIES = 1024  # compared with all training pictures at once


def knn_top1(train: Tensor, labels: Tensor, test: Tensor, truth: Tensor) -> float:
    """Percent of test pictures whose class the most alike training pictures vote for.

    Args:
        train, test: features [T, F] and [Q, F]; alike is what has a small angle.
        labels, truth: classes int64 [T] and [Q].
    """
    train, classes = F.normalize(train, dim=1), int(labels.max()) + 1
    hits = 0
    for queries, answers in zip(F.normalize(test, dim=1).split(_QUERIES), truth.split(_QUERIES), strict=True):
        likeness, nearest = (queries @ train.T).topk(min(NEIGHBOURS, len(train)), dim=1)  # [q, k]
        votes = likeness.new_zeros(len(queries), classes)
        votes.scatter_add_(1, labels[nearest], (likeness / TEMPERATURE).exp())
        hits += int((votes.argmax(dim=1) == answers).sum())
    return 100 * hits / len(truth)


def linear_top1(train: Tensor, labels: Tensor, test: Tensor, truth: Tensor, rounds: int = 100) -> float:
    """Percent of test pictures that a linear classifier, trained on frozen features, gets right.

    Logistic regression on standardised features with a penalty of |W|^2 / (2 T), as scikit-learn's default, by at most
    `rounds` iterations of L-BFGS from zero weights. Arguments as of `knn_top1`.
    """
    mean, std = train.mean(dim=0), train.std(dim=0).clamp(min=1e-6)
    train, test = (train - mean) / std, (test - mean) / std
    weight = train.new_zeros(int(labels.max()) + 1, train.shape[1], requires_grad=True)
    bias = train.new_zeros(len(weight), requires_grad=True)
    solver = torch.optim.LBFGS([weight, bias], max_iter=rounds, history_size=10, line_search_fn="strong_wolfe")

    def objective() -> Tensor:
        solver.zero_grad()
        loss = F.cross_entropy(F.linear(train, weight, bias), labels) + weight.square().sum() / (2 * len(train))
        loss.backward()
        return loss

    with torch.enable_grad():
        solver.step(objective)
    predicted = F.linear(test, weight.detach(), bias.detach()).argmax(dim=1)
    return 100 * int((predicted == truth).sum()) / len(truth)
