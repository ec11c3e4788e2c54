"""fairseq's JSON log lines (`train_inner`, `valid`, `train`), so that its users' parsers keep working.

Values are strings of rounded numbers, epoch and update are numbers; see fairseq/logging/{meters,progress_bar}.py.
`wps`, `wpb` and `ntokens` count *masked* tokens, as fairseq's do: the criterion reports its sample size there.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable


class Meters:
    """Sums over some updates, and the numbers fairseq derives from them."""

    def __init__(self):
        self.updates = 0
        self.loss = self.sample_size = self.sentences = 0.0
        self.gnorm = self.clipped = self.ema_decay = 0.0
        self.target_std = self.pred_std = 0.0
        self.spreads = 0  # updates that have these two
        self.seconds = 0.0  # in updates, without waiting for data
        self.began = time.perf_counter()

    def add(self, loss_sum: float, sample_size: float, sentences: float, ema_decay: float) -> None:
        """An update, or all of a validation."""
        self.updates += 1
        self.loss += loss_sum
        self.sample_size += sample_size
        self.sentences += sentences
        self.ema_decay += 1000 * ema_decay

    def add_step(self, gnorm: float, clip_norm: float, seconds: float) -> None:
        """What the optimizer's step of that update was."""
        self.gnorm += gnorm
        self.clipped += 100.0 * (0 < clip_norm < gnorm)
        self.seconds += seconds

    def add_spread(self, pred_std: float, target_std: float) -> None:
        """The standard deviations of that update, if it has any."""
        self.spreads += 1
        self.pred_std += pred_std
        self.target_std += target_std

    def state_dict(self) -> dict[str, float]:
        """The sums, and the wall seconds they took so far."""
        return {**vars(self), "began": time.perf_counter() - self.began}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Goes on from saved sums; the time between runs does not count."""
        known = {"spreads": state["updates"]} | state  # checkpoints before `spreads` counted every update
        vars(self).update(known, began=time.perf_counter() - state["began"])

    @property
    def mean_loss(self) -> float:
        return self.loss / max(self.sample_size, 1)

    def values(self, training: bool, spread: bool = False) -> dict[str, str]:
        """The line's keys up to `clip`, in fairseq's order; with `spread` the standard deviations that it calls var."""
        n = max(self.updates, 1)
        elapsed = max(time.perf_counter() - self.began, 1e-9)
        line = {
            "loss": number(self.mean_loss, 3),
            "ntokens": number(self.sample_size / n),
            "nsentences": number(self.sentences / n),
            "sample_size": number(self.sample_size / n),
            "ema_decay": number(self.ema_decay / n, 3),
        }
        if spread:
            known = max(self.spreads, 1)
            line |= {"target_var": number(self.target_std / known, 3), "pred_var": number(self.pred_std / known, 3)}
        line["wps"] = number(self.sample_size / elapsed, 1)
        if training:
            line["ups"] = number(self.updates / elapsed, 2)
        return line | {"wpb": number(self.sample_size / n, 1), "bsz": number(self.sentences / n, 1)}

    def training_values(
        self,
        num_updates: int,
        lr: float,
        loss_scale: float | None,
        wall: float,
        spread: bool = False,
        gb_free: float | None = None,
    ) -> dict[str, str]:
        """All keys of a training line; `loss_scale` and `gb_free` (GiB) only where they are known."""
        n = max(self.updates, 1)
        line = self.values(training=True, spread=spread) | {
            "num_updates": number(num_updates),
            "lr": number(lr),
            "gnorm": number(self.gnorm / n, 3),
            "clip": number(self.clipped / n, 1),
        }
        if loss_scale is not None:
            line["loss_scale"] = number(loss_scale, 4)
        line["train_wall"] = number(self.seconds, 0)
        if gb_free is not None:
            line["gb_free"] = number(gb_free, 1)
        return line | {"wall": number(wall, 0)}


def number(value: float, digits: int | None = None) -> str:
    """As fairseq prints it: rounded, then six significant digits."""
    return f"{value if digits is None else round(value, digits):g}"


def write_line(write: Callable[[str], None], tag: str, values: dict) -> None:
    """`[2023-04-11 12:00:00,000][train_inner][INFO] - {...}`"""
    now = time.time()
    stamp = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(now)) + f",{int(now * 1000) % 1000:03d}"
    write(f"[{stamp}][{tag}][INFO] - {json.dumps(values)}")


def prefixed(values: dict[str, str], prefix: str) -> dict[str, str]:
    return {f"{prefix}_{key}": value for key, value in values.items()}
