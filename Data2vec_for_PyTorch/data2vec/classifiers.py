"""Linear and nearest-neighbour classifiers on frozen features."""

from __future__ import annotations

import torch
import torch.nn.functional as F

RIDGES = (1e-2, 1e-1, 1.0, 10.0)
DECAY, ITERATIONS = 1e-4, 60


def commonest(labels: torch.Tensor, classes: int) -> torch.Tensor:
    """The labels that occur most, int64 [K], K at most `classes`, the commonest first."""
    counts = torch.bincount(labels)
    return counts.argsort(descending=True)[: min(classes, int((counts > 0).sum()))]


def linear_probe(
    train_x: torch.Tensor, train_y: torch.Tensor, valid_x: torch.Tensor, valid_y: torch.Tensor, classes: int = 100
) -> tuple[float, float]:
    """(accuracy of a ridge classifier, share of the commonest label), percent, over the commonest `classes` labels.

    The strength of the ridge is the best of RIDGES on every fifth training row, fitted on the others.
    """
    labels = commonest(train_y, classes)
    x, y = _prepared(train_x, train_y, labels, train_x)
    aside = torch.arange(len(x)) % 5 == 0
    tries = [(_ridge(x[~aside], y[~aside], len(labels), ridge), ridge) for ridge in RIDGES]
    best = max(tries, key=lambda tried: _percent((x[aside].double() @ tried[0]).argmax(dim=1) == y[aside]))[1]
    weights = _ridge(x, y, len(labels), best)
    x, y = _prepared(valid_x, valid_y, labels, train_x)
    return _percent((x.double() @ weights).argmax(dim=1) == y), _percent(y == 0)


def _ridge(x: torch.Tensor, y: torch.Tensor, classes: int, ridge: float) -> torch.Tensor:
    """Weights fp64 [D, classes] of the ridge regression from x [N, D] to one-hot labels."""
    x, target = x.double(), F.one_hot(y, classes).double()
    return torch.linalg.solve(x.T @ x + ridge * len(x) * torch.eye(x.shape[1]), x.T @ target)


def logistic_probe(
    train_x: torch.Tensor, train_y: torch.Tensor, valid_x: torch.Tensor, valid_y: torch.Tensor, classes: int = 100
) -> tuple[float, float]:
    """As `linear_probe`, fitted by cross-entropy: for many classes and tens of thousands of examples."""
    fitted = LogisticRegression(train_x, train_y, classes)
    kept = torch.isin(valid_y, fitted.labels)
    guesses = fitted.predict(valid_x[kept])
    return _percent(guesses == valid_y[kept]), _percent(valid_y[kept] == fitted.labels[0])


class LogisticRegression:
    """A linear classifier of the commonest `classes` labels, fitted to x [N, D] and labels y [N] by cross-entropy."""

    def __init__(self, x: torch.Tensor, y: torch.Tensor, classes: int):
        self.labels = commonest(y, classes)
        self.examples = x
        x, y = _prepared(x, y, self.labels, x)
        weights = torch.zeros(x.shape[1], len(self.labels), requires_grad=True)
        optimizer = torch.optim.LBFGS([weights], max_iter=ITERATIONS, line_search_fn="strong_wolfe")

        def loss() -> torch.Tensor:
            optimizer.zero_grad()
            value = F.cross_entropy(x @ weights, y) + DECAY * weights.square().sum()
            value.backward()
            return value

        optimizer.step(loss)
        self.weights = weights.detach()  # [D + 1, K]

    def predict(self, x: torch.Tensor) -> torch.Tensor:
        """int64 [N]: the likeliest label of each row."""
        x, _ = _prepared(x, self.labels[:1].expand(len(x)), self.labels, self.examples)
        return self.labels[(x @ self.weights).argmax(dim=1)]


def nearest_neighbour(
    train_x: torch.Tensor, train_y: torch.Tensor, valid_x: torch.Tensor, valid_y: torch.Tensor
) -> float:
    """Percent of `valid_y` that is the label of the training row nearest by cosine, both less the training mean."""
    mean = train_x.mean(dim=0)
    train_x, valid_x = (F.normalize(x - mean, dim=1) for x in (train_x, valid_x))
    return _percent(train_y[(valid_x @ train_x.T).argmax(dim=1)] == valid_y)


def retrieval(pred: torch.Tensor, target: torch.Tensor) -> float:
    """Recall@1 in percent by cosine similarity, both sides centred."""
    pred, target = (F.normalize(x - x.mean(dim=0), dim=1) for x in (pred, target))
    nearest = (pred @ target.T).argmax(dim=1)
    return _percent(nearest == torch.arange(len(pred)))


def _prepared(x, y, labels, reference) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows whose label is among `labels`, standardised as `reference`, with a 1 at the end; and the labels' places."""
    place = torch.full((int(torch.cat([y, labels]).max()) + 1,), -1)
    place[labels] = torch.arange(len(labels))
    kept = place[y] >= 0
    x = (x[kept] - reference.mean(dim=0)) / (reference.std(dim=0) + 1e-6)
    return torch.cat([x, torch.ones(len(x), 1)], dim=1), place[y[kept]]


def _percent(right: torch.Tensor) -> float:
    return 100 * right.double().mean().item()
