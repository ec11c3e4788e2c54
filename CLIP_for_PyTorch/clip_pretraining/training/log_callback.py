"""What the Trainer does from step to step, told to our log; evaluations, the best model, signals."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from transformers import TrainerCallback

from clip_pretraining import resume
from clip_pretraining.data.pairs import PairDataset
from clip_pretraining.training.sharding import whole

if TYPE_CHECKING:
    from clip_pretraining.training.trainer import ClipTrainer

UNFINISHED = "unfinished_evaluation"  # in a checkpoint's log history: a signal came during it


class Names(Sequence):
    """The pairs of a batch, in words only when somebody asks."""

    def __init__(self, dataset: PairDataset, rows: list[int]):
        self.dataset, self.rows = dataset, rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, position: int) -> str:
        return self.dataset.name(self.rows[position])


class RunLogCallback(TrainerCallback):
    """Steps, evaluations and the best model to our log and folder."""

    def __init__(self):
        self.trainer: ClipTrainer  # set once the trainer exists
        self.grad_norm: torch.Tensor | float = 0.0  # of the last step that was applied

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        if any(UNFINISHED in line for line in state.log_history[-1:]):
            state.log_history.pop()
            self.trainer.evaluate()

    def on_step_end(self, args, state, control, model=None, **kwargs) -> None:
        trainer = self.trainer
        outcome, scale = trainer.optimizer.outcome, trainer.scale
        if outcome.applied:
            self.grad_norm = outcome.norm  # of a skipped step it is inf or nan
        if state.global_step % trainer.run_log.log_every == 0 or state.global_step == state.max_steps:
            trainer.check_finite()
        extra = {"loss_scale": scale.scale, "skipped": float(not outcome.applied)} if scale.enabled else {}
        trainer.run_log.step(
            state.global_step,
            samples=trainer.last_samples,
            loss=trainer.last_loss,
            lr=trainer.last_lr,
            grad_norm=self.grad_norm,
            epoch=state.epoch,
            flops=trainer.last_flops,
            logit_scale=whole(model.logit_scale.detach()).exp().reshape(()),
            **extra,
        )
        if trainer.run_log.preempted():
            control.should_save = control.should_training_stop = True
            control.should_evaluate = False
            trainer.stopped_at = state.global_step

    def on_evaluate(self, args, state, control, metrics=None, **kwargs) -> None:
        self.trainer.run_log.record(state.global_step, "eval", **metrics)
        if self.trainer.is_in_train:
            resume.keep_best(self.trainer, metrics["eval_loss"])
