"""GLUE's metrics of predictions, by scikit-learn (correlations by scipy, which comes with it)."""

from __future__ import annotations

import numpy as np


def classification_metrics(predicted: np.ndarray, target: np.ndarray, classes: int) -> dict[str, float]:
    """accuracy, F1 (of the second class where there are two, else the mean over classes), Matthews correlation.

    Args:
        predicted, target: class numbers [N].
    """
    from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

    f1 = {"average": "binary"} if classes == 2 else {"average": "macro", "labels": range(classes)}
    return {
        "accuracy": float(accuracy_score(target, predicted)),
        "f1": float(f1_score(target, predicted, zero_division=0, **f1)),
        "mcc": float(matthews_corrcoef(target, predicted)),
    }


def regression_metrics(predicted: np.ndarray, target: np.ndarray) -> dict[str, float]:
    """Pearson and Spearman correlation of numbers [N]; 0 where one side is constant, as Matthews' has it."""
    from scipy.stats import pearsonr, spearmanr

    if len(target) < 2 or np.ptp(predicted) == 0 or np.ptp(target) == 0:
        return {"pearson": 0.0, "spearman": 0.0}
    return {
        "pearson": float(pearsonr(predicted, target).statistic),
        "spearman": float(spearmanr(predicted, target).statistic),
    }
