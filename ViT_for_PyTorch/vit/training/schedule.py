"""Learning rate: linear warm-up, then half a cosine, in fractional epochs (facebookresearch/mae util/lr_sched.py)."""

import math


def learning_rate_at(epoch: float, *, lr: float, min_lr: float, warmup_epochs: float, epochs: float) -> float:
    """The rate at `epoch` = epochs done, as a fraction: `step / steps_per_epoch`. Past `epochs` it stays at `min_lr`.

    MAE sets it once per optimizer step, from the first micro-batch of that step.
    """
    if epoch < warmup_epochs:
        return lr * epoch / warmup_epochs
    if epoch >= epochs:
        return min_lr
    progress = (epoch - warmup_epochs) / (epochs - warmup_epochs)
    return min_lr + (lr - min_lr) * 0.5 * (1.0 + math.cos(math.pi * progress))


def scaled_lr(base_lr: float, global_batch: int) -> float:
    """The linear scaling rule: `base_lr` is per 256 pictures; `global_batch` = batch x accumulation x ranks."""
    return base_lr * global_batch / 256
