"""Learning rate and weight decay by step (reference `utils.cosine_scheduler`)."""

from __future__ import annotations

import numpy as np


def cosine_schedule(
    base: float,
    final: float,
    epochs: int,
    steps_per_epoch: int,
    warmup_epochs: int = 0,
    start_warmup_value: float = 0,
    warmup_steps: int = -1,
) -> np.ndarray:
    """Linear warm-up to `base`, then half a cosine towards `final`: one value a step.

    The warm-up contains both its ends, so the first step has `start_warmup_value` and `base` comes twice.
    `warmup_steps` above 0 counts instead of `warmup_epochs`. (In the reference it does so only beside warmup_epochs
    above 0, and fails otherwise.)

    Returns:
        float64 [epochs * steps_per_epoch].

    Raises:
        ValueError: the warm-up is longer than the training.
    """
    total = epochs * steps_per_epoch
    warmup = warmup_steps if warmup_steps > 0 else warmup_epochs * steps_per_epoch
    if warmup > total:
        raise ValueError(
            f"a warm-up of {warmup} steps (--warmup_epochs {warmup_epochs}, --warmup_steps {warmup_steps}) is longer "
            f"than the training of {total} (--epochs {epochs} of {steps_per_epoch} steps)"
        )
    rest = np.arange(total - warmup)
    cosine = final + 0.5 * (base - final) * (1 + np.cos(np.pi * rest / max(1, len(rest))))
    return np.concatenate((np.linspace(start_warmup_value, base, warmup), cosine))
