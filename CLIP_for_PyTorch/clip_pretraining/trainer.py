"""The `transformers` Trainer with CLIP's loss, large batches in chunks, repeatable dropout and batches, and our log."""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import CLIPTextModel, PrinterCallback, Trainer, TrainerCallback

from clip_pretraining import loss as losses
from clip_pretraining import resume
from clip_pretraining.evaluation import normalise_pixels
from clip_pretraining.modeling import ImageSettings
from clip_pretraining.pairs import EpochLoader, GlobalBatchSampler, one_thread
from common import distributed
from common.device import grad_scaler, seeded
from common.distributed import World
from common.run_log import RunLog

MAX_SKIPPED_STEPS = 50  # fp16 steps without an update in a row: the loss scale will not find its way any more
MAX_LOGIT_SCALE = math.log(100)  # arXiv:2103.00020, section 2.5
MAX_CONSTANT_LOSS_SCALE = 65536.0  # above it the first fp16 gradient may be infinite for ever


class ClipTrainer(Trainer):
    """Differences from `Trainer`, each in one method: batches, step, loss, finite check, evaluation, checkpoints.

    Args:
        world: ranks and device.
        run_log: our log, already entered.
        settings: mean and deviation for the pixels, which arrive as uint8.
        evaluator: () -> metrics without prefix, called on all ranks.
        run_facts: what a resumed run must share with the one that wrote the checkpoint.
        kwargs: as `Trainer`.
    """

    def __init__(
        self,
        *,
        world: World,
        run_log: RunLog,
        settings: ImageSettings,
        evaluator: Callable[[], dict[str, float]] | None,
        run_facts: dict[str, Any],
        **kwargs,
    ):
        self.world = world
        self.run_log = run_log
        self.evaluator = evaluator
        self.run_facts = run_facts
        super().__init__(**kwargs)
        self.remove_callback(PrinterCallback)  # our log prints
        self._mean = torch.tensor(settings.mean, device=self.args.device)
        self._std = torch.tensor(settings.std, device=self.args.device)
        self.last_loss = self.last_grad_norm = torch.zeros(())
        self.last_lr = 0.0
        self.last_samples = 0
        self.skipped_steps = 0
        self._suspect: torch.Tensor | float = 0.0  # see check_finite

    # -- batches -----------------------------------------------------------------------------------------------------

    def get_train_dataloader(self) -> EpochLoader:
        args = self.args
        sampler = GlobalBatchSampler(
            len(self.train_dataset),
            args.per_device_train_batch_size,
            args.seed if args.data_seed is None else args.data_seed,
            self.world.rank,
            self.world.size,
            args.dataloader_drop_last,
        )
        return EpochLoader(
            self.train_dataset,
            batch_sampler=sampler,
            collate_fn=self.data_collator,
            num_workers=args.dataloader_num_workers,
            prefetch_factor=args.dataloader_prefetch_factor,
            persistent_workers=False,  # a resumed epoch starts with other batches
            pin_memory=self.world.device.type != "cpu",
            worker_init_fn=one_thread,
        )

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        with self.run_log.data_wait():
            return super().get_batch_samples(epoch_iterator, num_batches, device)

    def _prepare_inputs(self, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        inputs = {key: value.to(self.args.device, non_blocking=True) for key, value in inputs.items()}
        if self.world.device.type != "cpu":
            inputs["attention_mask"] = full_attention_mask(inputs["attention_mask"], self.model.text_model)
        return {**inputs, "pixel_values": normalise_pixels(inputs["pixel_values"], self._mean, self._std)}

    def _run_epoch(self, *args, **kwargs) -> None:
        if self.state.global_step < self.state.max_steps:  # else `Trainer` adds a step to a finished run
            super()._run_epoch(*args, **kwargs)

    # -- the step ----------------------------------------------------------------------------------------------------

    def training_step(self, model: nn.Module, inputs: dict[str, torch.Tensor], num_items_in_batch=None) -> torch.Tensor:
        """Forward and backward of this rank's share of the global batch, in chunks when it was asked for."""
        model.train()
        self.last_samples = len(inputs["input_ids"]) * self.world.size
        micro = self.args.micro_batch_size
        if len(inputs["input_ids"]) > micro:
            loss = self._chunked_step(model, inputs, micro)
        else:
            loss = self._objective(*self._features(model, inputs, chunk=0))
            self.accelerator.backward(loss)
        self.last_loss = loss.detach()
        return self.last_loss

    def _chunked_step(self, model: nn.Module, inputs: dict[str, torch.Tensor], micro: int) -> torch.Tensor:
        """The gradient of the whole batch with the memory of one chunk (GradCache, arXiv:2101.06983).

        Features of all chunks without gradient -> loss and its gradient with respect to them -> every chunk once more,
        with the same dropout, backward from its share of that gradient.
        """
        keys, split = list(inputs), [value.split(micro) for value in inputs.values()]
        chunks = [dict(zip(keys, part, strict=True)) for part in zip(*split, strict=True)]
        with torch.no_grad():
            cached = [self._features(model, chunk, index) for index, chunk in enumerate(chunks)]
        image, text = (torch.cat(parts).requires_grad_() for parts in zip(*cached, strict=True))  # [B, d] each
        scalars = [p for p in (self.model.logit_scale, getattr(self.model, "logit_bias", None)) if p is not None]
        loss = self._objective(image, text)
        image_grad, text_grad, *scalar_grads = torch.autograd.grad(loss, [image, text, *scalars])

        for index, chunk in enumerate(chunks):
            is_last = index == len(chunks) - 1
            # DDP's all-reduce runs once, with the last chunk
            with contextlib.nullcontext() if is_last else self.accelerator.no_sync(model):
                image, text = self._features(model, chunk, index)
                rows = slice(index * micro, index * micro + len(image))
                surrogate = (image * image_grad[rows]).sum() + (text * text_grad[rows]).sum()
                if is_last:
                    surrogate = surrogate + sum(p * g for p, g in zip(scalars, scalar_grads, strict=True))
                self.accelerator.backward(surrogate)
        return loss

    def _features(
        self, model: nn.Module, inputs: dict[str, torch.Tensor], chunk: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """L2-normalised features; dropout follows from (seed, step, rank, chunk), so a second pass repeats it."""
        seeded(self.args.seed, self.state.global_step, self.world.rank, chunk)
        output = model(**self._prepare_inputs(inputs))
        return output.image_embeds.float(), output.text_embeds.float()

    def _objective(self, image: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        scale, scope = self.model.logit_scale, self.args.contrastive_scope
        if self.args.loss == "siglip":
            return losses.siglip_loss(image, text, scale, self.model.logit_bias, scope)
        return losses.contrastive_loss(image, text, scale, scope)

    def _get_grad_norm(self, model: nn.Module, grad_norm=None):
        """Before the optimizer step: a gradient that is not finite must not reach the weights.

        Fused AdamW skips the update on the device; `check_finite` stops the run at the next log line. Other optimizers
        cannot skip, so the host looks at once, which waits for the device.
        """
        norm = super()._get_grad_norm(model, grad_norm)
        self.last_grad_norm = norm
        self.last_lr = self._get_learning_rate()
        self._suspect = self._suspect + self.last_loss.float() * 0  # 0, or nan from then on
        # under fp16 the scaler skips steps with infinite gradients, which is its way of finding the scale
        if not self.args.fp16:
            self._suspect = self._suspect + torch.as_tensor(norm).float() * 0
            optimizer = self.optimizer.optimizer  # inside accelerate's
            if isinstance(optimizer, torch.optim.AdamW) and optimizer.defaults["fused"]:
                optimizer.found_inf = (~torch.as_tensor(norm).isfinite()).float()
            else:
                self.check_finite(self.state.global_step + 1)
        return norm

    def check_finite(self, step: int) -> None:
        """Stops all ranks when a loss or gradient of any was not finite; at log lines and before every save."""
        distributed.stop_if_nonfinite(self._suspect, "the loss or the gradient norm", step)

    # -- device and precision ----------------------------------------------------------------------------------------

    def create_accelerator_and_postprocess(self) -> None:
        # torch's new name for the option is not yet in accelerate
        warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
        super().create_accelerator_and_postprocess()
        if self.args.fp16:
            # accelerate leaves fp16 out on a CPU without a word and would train in fp32; torch can do it
            self.accelerator.native_amp = True
            self.accelerator.scaler = gradient_scaler(self.args.device, self.args.loss_scale)

    # -- evaluation and checkpoints ----------------------------------------------------------------------------------

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """In-batch loss and retrieval of the validation split (evaluation.py), on all ranks."""
        with self.run_log.pause("evaluate"):
            metrics = {f"{metric_key_prefix}_{key}": value for key, value in self.evaluator().items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _save_checkpoint(self, model: nn.Module, trial) -> None:
        """As `Trainer`, and a mark at the very end: a checkpoint without it was cut short and is never resumed from."""
        self.check_finite(self.state.global_step)
        with self.run_log.pause("save"):
            folder = resume.checkpoint_folder(self.args.output_dir, self.state.global_step)
            if self.world.is_main:
                resume.unmark(folder)
            super()._save_checkpoint(model, trial)
            distributed.barrier()
            if self.world.is_main:
                resume.mark_complete(folder, self.run_facts)


def full_attention_mask(mask: torch.Tensor, text_model: nn.Module) -> torch.Tensor:
    """[B, T] of 0 and 1 -> bool [B, 1, T, T], True where a token sees another.

    transformers asks a [B, T] mask whether it hides anything at all, and the host waits for the answer; a mask of full
    size it takes as it is. CLIP's own text model is causal.
    """
    length = mask.shape[1]
    seen = mask.bool()[:, None, None, :].expand(-1, 1, length, -1)  # [B, 1, T, T]
    return seen.tril() if isinstance(text_model, CLIPTextModel) else seen


def gradient_scaler(device: torch.device, loss_scale: float | None) -> torch.amp.GradScaler:
    """fp16's scaler: constant for a number as in apex, dynamic without one, or from one that no constant can be."""
    if loss_scale is None or loss_scale <= MAX_CONSTANT_LOSS_SCALE:
        return grad_scaler(device, "fp16", "dynamic" if loss_scale is None else loss_scale)
    return torch.amp.GradScaler(device.type, init_scale=loss_scale)


class RunLogCallback(TrainerCallback):
    """Steps, evaluations and the best model to our log and folder; keeps logit_scale below ln 100."""

    def __init__(self, clamp_logit_scale: bool):
        self.trainer: ClipTrainer  # set once the trainer exists
        self.clamp_logit_scale = clamp_logit_scale
        self.grad_norm: torch.Tensor | float = 0.0

    def on_optimizer_step(self, args, state, control, model=None, **kwargs) -> None:
        if self.clamp_logit_scale:
            with torch.no_grad():
                model.logit_scale.clamp_(0, MAX_LOGIT_SCALE)

    def on_step_end(self, args, state, control, model=None, **kwargs) -> None:
        trainer = self.trainer
        if trainer.accelerator.optimizer_step_was_skipped:
            trainer.skipped_steps += 1
        else:
            trainer.skipped_steps = 0
            self.grad_norm = trainer.last_grad_norm  # of a skipped step it is inf or nan
        if trainer.skipped_steps >= MAX_SKIPPED_STEPS:
            raise FloatingPointError(
                f"{MAX_SKIPPED_STEPS} steps in a row without an update: fp16 gradients overflow at every loss scale; "
                "use --precision bf16 or fp32"
            )
        if state.global_step % trainer.run_log.log_every == 0 or state.global_step == state.max_steps:
            trainer.check_finite(state.global_step)
        extra = {"loss_scale": trainer.accelerator.scaler.get_scale()} if trainer.accelerator.scaler else {}
        trainer.run_log.step(
            state.global_step,
            samples=trainer.last_samples,
            loss=trainer.last_loss,
            lr=trainer.last_lr,
            grad_norm=self.grad_norm,
            epoch=state.epoch,
            logit_scale=model.logit_scale.detach().exp(),
            **extra,
        )

    def on_evaluate(self, args, state, control, metrics=None, **kwargs) -> None:
        self.trainer.run_log.record(state.global_step, "eval", **metrics)
        if self.trainer.is_in_train and self.trainer.world.is_main:
            resume.keep_best(self.trainer, metrics["eval_loss"])
