"""GLUE's metrics of predictions, by scikit-learn (correlations by scipy, which comes with it)."""

from __future__ import annotations

import numpy as np

from data2vec.config.keys import REGRESSION_METRICS


def classification_metrics(predicted: np.ndarray, target: np.ndarray, classes: int) -> dict[str, float]:
    """accuracy, F1 (of the second class where there are two, else the mean over classes), Matthews correlation, and
    fairseq's acc_and_f1, the mean of the first two.

    Args:
        predicted, target: class numbers [N].
    """
    from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

    f1 = {"average": "binary"} if classes == 2 else {"average": "macro", "labels": range(classes)}
    found = {
        "accuracy": float(accuracy_score(target, predicted)),
        "f1": float(f1_score(target, predicted, zero_division=0, **f1)),
        "mcc": float(matthews_corrcoef(target, predicted)),
    }
    return found | {"acc_and_f1": (found["accuracy"] + found["f1"]) / 2}


def regression_metrics(predicted: np.ndarray, target: np.ndarray) -> dict[str, float]:
    """Pearson and Spearman correlation of numbers [N], and their mean; 0 where one side is constant, like Matthews."""
    from scipy.stats import pearsonr, spearmanr

    if len(target) < 2 or np.ptp(predicted) == 0 or np.ptp(target) == 0:
        return dict.fromkeys(REGRESSION_METRICS, 0.0)
    pearson, spearman = float(pearsonr(predicted, target).statistic), float(spearmanr(predicted, target).statistic)
    return dict(zip(REGRESSION_METRICS, (pearson, spearman, (pearson + spearman) / 2), strict=True))
