"""What fine-tuning has of its own: its forward pass, predictions over all ranks, metrics and log lines."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig

from common import device as devices
from common import distributed
from common.distributed import World
from common.run.preemption import asked, until_asked
from common.run_log import RunLog
from data2vec.data.epochs import EpochBatches
from data2vec.data.sentence_data import SentenceBatch, Sentences
from data2vec.model.sentence_model import SentenceModel, sentence_loss
from data2vec.training.loop import Training
from data2vec.training.metrics import classification_metrics, regression_metrics
from data2vec.training.update import TrainState, UpdateResult


def forward(model: SentenceModel, batch: SentenceBatch) -> dict[str, Any]:
    """Logits fp32 [B, outputs], the sum of losses, and the number of sentences."""
    logits = model(batch.tokens, batch.first, batch.has_padding)
    return {"loss_sum": sentence_loss(logits, batch.target), "sample_size": len(batch.id), "logits": logits}


@torch.no_grad()
def predict(
    model: SentenceModel, batches: EpochBatches, workers: int, world: World, precision: str
) -> tuple[np.ndarray, torch.Tensor] | None:
    """(rows int64 [N], ascending, their logits fp32 [N, outputs]) of all ranks, on all ranks: each row once.

    None on all ranks where one was asked to stop meanwhile.
    """
    model.eval()
    rows, logits = [np.zeros(0, dtype=np.int64)], []
    for batch in until_asked(batches.loader(workers)):
        if len(batch.id) == 0:
            continue
        batch = batch.to(world.device)
        with devices.autocast(world.device, precision):
            logits.append(model(batch.tokens, batch.first, batch.has_padding).cpu())
        rows.append(batch.id.numpy())
    found = distributed.gather_objects((np.concatenate(rows), torch.cat(logits) if logits else None, asked()))
    if any(stopped for *_, stopped in found):
        return None
    rows = np.concatenate([part for part, *_ in found])
    order = np.argsort(rows)
    return rows[order], torch.cat([part for _, part, _ in found if part is not None])[torch.from_numpy(order)]


def metrics_of(logits: torch.Tensor, target: np.ndarray, classes: int | None) -> dict[str, float]:
    """Mean loss, and GLUE's metrics. `classes` is None for a regression."""
    values = {"loss": float(sentence_loss(logits.double(), torch.from_numpy(target))) / len(target)}
    if classes is None:
        return values | regression_metrics(logits.squeeze(1).numpy(), target)
    return values | classification_metrics(logits.argmax(dim=1).numpy(), target, classes)


def evaluate(run: Training, epoch: int, name: str) -> float | None:
    """Of a split, as `Training.evaluate`."""
    with run.report.log.pause("validate"):
        batches = run.data.valid_batches(name)
        found = predict(run.state.model, batches, run.config.dataset.num_workers, run.world, run.precision)
    if found is None:
        return None
    rows, logits = found
    data: Sentences = batches.data
    classes = None if data.classes is None else len(data.classes)
    return run.report.validation(run.state, epoch, name, metrics_of(logits, data.targets[rows], classes))


class FineTuningReport:
    """What a fine-tuning writes, with the methods of `report.Report` that the loop calls.

    Attributes:
        best_metric: by which the best checkpoint is chosen.
    """

    def __init__(self, log: RunLog, config: DictConfig):
        self.log, self.config = log, config
        self.updates_per_epoch = 1
        self.best_metric = config.checkpoint.best_checkpoint_metric or main_metric(config)
        self._last: dict[str, float] = {}  # of the first validation split

    def update(self, state: TrainState, result: UpdateResult, seconds: float, samples: int, flops: float) -> None:
        """Takes note of one update, of `samples` over all ranks."""
        if result.skipped:
            self.log.info(f"gradient overflow at update {state.num_updates}: loss scale now {state.scaler.scale:g}")
            return
        done = state.iterations / self.config.optimization.update_freq[0]
        self.log.step(
            state.num_updates,
            samples=samples,
            flops=flops,
            loss=result.loss_sum / result.sample_size.clamp(min=1),
            lr=result.lr,
            grad_norm=result.grad_norm,
            epoch=state.epoch - 1 + min(1.0, done / self.updates_per_epoch),
        )

    def read(self, state: TrainState) -> None:
        """FloatingPointError where an update was not finite."""
        state.step.check()

    def end_of_epoch(self, state: TrainState, epoch: int) -> None:
        self.read(state)

    def meters(self) -> dict[str, dict[str, float]]:
        """There are no lines in the making."""
        return {}

    def validation(self, state: TrainState, epoch: int, name: str, values: dict[str, float]) -> float:
        """Records the metrics; returns what the best checkpoint has the least of: the loss, or a metric's negative."""
        self.log.record(state.num_updates, name, epoch=epoch, **values)
        if name == self.config.dataset.valid_subset.split(",")[0]:
            self._last = values
        return values["loss"] if self.best_metric == "loss" else -values[self.best_metric]

    def finish(self, state: TrainState) -> None:
        """The result file: metrics of the last validation, and the best that a checkpoint has."""
        main = main_metric(self.config)
        known: dict[str, Any] = {"NumUpdates": state.num_updates}
        known |= {f"Valid{name.capitalize()}": round(value, 6) for name, value in self._last.items()}
        if state.best_loss is not None:
            known[f"ValidBest{self.best_metric.capitalize()}"] = round(
                -state.best_loss if self.best_metric != "loss" else state.best_loss, 6
            )
        if self._last:
            known |= {"accuracy": round(100 * self._last[main], 3), "AccuracyIs": f"{main} of held-out rows, x 100"}
        self.log.finish(**known)


def main_metric(config: DictConfig) -> str:
    return "pearson" if config.task.regression_target else "accuracy"
