"""The `transformers` Trainer with CLIP's loss, large batches in chunks, repeatable dropout and batches, and our log."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import PrinterCallback, Trainer

from clip_pretraining import resume
from clip_pretraining.data.batches import EpochLoader, GlobalBatchSampler, one_thread
from clip_pretraining.evaluation.encoder import normalise_pixels
from clip_pretraining.model import loss as losses
from clip_pretraining.model.flops import step_flops
from clip_pretraining.model.layers import full_attention_mask
from clip_pretraining.model.loading import AVERAGE_FILE, ImageSettings
from clip_pretraining.training import sharding
from clip_pretraining.training.guarded_optimizer import GuardedOptimizer, scale_of
from clip_pretraining.training.log_callback import UNFINISHED, Names
from clip_pretraining.training.sharding import whole
from clip_pretraining.training.weight_average import WeightAverage
from common import checkpoint_file, distributed
from common.device import pins_memory, seeded
from common.distributed import World
from common.model import adapters
from common.run.new_file import readable
from common.run.preemption import Interrupted
from common.run_log import RunLog
from common.shards import gathered
from common.update import gradients_stay_local

MAX_LOGIT_SCALE = math.log(100)  # arXiv:2103.00020, section 2.5
SCALE_FILE, OPTIMIZER_FILE = "scaler.pt", "optimizer.pt"  # Trainer's names for them


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
        self.scale = scale_of(world.device, kwargs["args"].precision, kwargs["args"].loss_scale)
        self.clamp_logit_scale = kwargs["args"].clamp_logit_scale
        super().__init__(**kwargs)
        self.remove_callback(PrinterCallback)  # our log prints
        if self.args.sharded and self.args.do_train:
            sharding.shard(self.model, world)
            self.is_distributed_loading_by_transformers = True  # `Trainer`: neither DDP nor accelerate's FSDP around it
        self.average = WeightAverage(self.model, self.args.ema_decay if self.args.do_train else 0.0)
        self._mean = torch.tensor(settings.mean, device=self.args.device)
        self._std = torch.tensor(settings.std, device=self.args.device)
        self.last_loss = torch.zeros(())
        self.last_lr = 0.0
        self.last_samples = 0
        self.stopped_at: int | None = None  # the step after which a signal ended the training
        self._kept: dict[str, Any] = {}  # of the checkpoint that is being made: its tensors, by file
        self._caption_ids: torch.Tensor | None = None  # of the step's batch, with --mask_equal_captions

    # -- batches -----------------------------------------------------------------------------------------------------

    def get_train_dataloader(self) -> EpochLoader:
        args, pairs = self.args, self.train_dataset.pairs
        sampler = GlobalBatchSampler(
            len(self.train_dataset),
            args.per_device_train_batch_size,
            args.seed if args.data_seed is None else args.data_seed,
            self.world.rank,
            self.world.size,
            args.dataloader_drop_last,
            pairs.keys() if args.distinct_pairs else None,
            args.source_weights or (pairs.source_sizes() if args.with_replacement else None),
            pairs.starts,
        )
        return EpochLoader(
            self.train_dataset,
            batch_sampler=sampler,
            collate_fn=self.data_collator,
            num_workers=args.dataloader_num_workers,
            prefetch_factor=args.dataloader_prefetch_factor,
            persistent_workers=False,  # a resumed epoch starts with other batches
            pin_memory=pins_memory(self.world.device),
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
        pairs, length = inputs["input_ids"].shape
        self.last_samples = pairs * self.world.size
        self.last_flops = step_flops(self.model, pairs, length) * self.world.size  # captions may differ between ranks
        micro = self.args.micro_batch_size
        if (rows := inputs.pop("rows", None)) is not None:
            names = Names(self.train_dataset, rows.tolist())
            self.optimizer.guard.remember(self.state.global_step + 1, names)
        ids = inputs.pop("caption_ids", None)
        self._caption_ids = None if ids is None else ids.to(self.args.device, non_blocking=True)
        if len(inputs["input_ids"]) > micro:
            loss = self._chunked_step(model, inputs, micro)
        else:
            loss = self._objective(*self._features(model, inputs, chunk=0), *self._scalars())
            self.accelerator.backward(self.optimizer.guard.scaled(loss))
        self.last_loss = loss.detach()
        return self.last_loss

    def gradients_of(self, step: int, checkpoint: Path | None) -> torch.Tensor:
        """Forward and backward of a step, counted from 1, on a checkpoint's weights, outside of a training.

        Returns:
            This rank's loss.
        """
        if checkpoint is not None:
            self._load_from_checkpoint(str(checkpoint))
            self._load_scaler(str(checkpoint))
        loader = self.get_train_dataloader()
        sampler = loader.batch_sampler
        epoch, position = divmod(step - 1, len(sampler))
        loader.set_epoch(epoch)
        rows = next(islice(sampler, position, None))
        inputs = self.data_collator([self.train_dataset[row] for row in rows])
        self.state.global_step = step - 1
        model = self.accelerator.prepare_model(self.model, evaluation_mode=self.is_distributed_loading_by_transformers)
        return self.training_step(model, inputs)

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
        scalars = [whole(scalar.detach()).requires_grad_() for scalar in self._scalars()]
        loss = self._objective(image, text, *scalars)
        image_grad, text_grad, *scalar_grads = torch.autograd.grad(loss, [image, text, *scalars])

        for index, chunk in enumerate(chunks):
            is_last = index == len(chunks) - 1
            # DDP's all-reduce runs once, with the last chunk
            with gradients_stay_local(model, not is_last):
                image, text = self._features(model, chunk, index)
                rows = slice(index * micro, index * micro + len(image))
                surrogate = (image * image_grad[rows]).sum() + (text * text_grad[rows]).sum()
                if is_last:
                    pairs = zip(self._scalars(), scalar_grads, strict=True)
                    surrogate = surrogate + sum((scalar * grad).sum() for scalar, grad in pairs)
                self.accelerator.backward(self.optimizer.guard.scaled(surrogate))
        return loss

    def _features(
        self, model: nn.Module, inputs: dict[str, torch.Tensor], chunk: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """L2-normalised features; dropout follows from (seed, step, rank, chunk), so a second pass repeats it."""
        seeded(self.args.seed, self.state.global_step, self.world.rank, chunk)
        output = model(**self._prepare_inputs(inputs))
        return output.image_embeds.float(), output.text_embeds.float()

    def _scalars(self) -> list[torch.Tensor]:
        """The loss's own parameters, logit_scale and, of SigLIP's, logit_bias; whole ones after a forward pass."""
        return [self.model.logit_scale, *([self.model.logit_bias] if self.args.loss == "siglip" else [])]

    def _objective(self, image: torch.Tensor, text: torch.Tensor, *scalars: torch.Tensor) -> torch.Tensor:
        scalars = [scalar.reshape(()) for scalar in scalars]  # of a sharded model they have a dimension
        loss = losses.siglip_loss if self.args.loss == "siglip" else losses.contrastive_loss
        return loss(image, text, *scalars, self.args.contrastive_scope, self._caption_ids)

    def create_optimizer(self, model: nn.Module | None = None) -> GuardedOptimizer:
        """As `Trainer`; the step is the house's (common/update.py), which also clips."""
        if not isinstance(self.optimizer, GuardedOptimizer):
            optimizer = super().create_optimizer(model)
            self.optimizer = GuardedOptimizer(
                optimizer,
                lambda: self.model.parameters(),
                self.scale,
                self.args.max_grad_norm,
                self._step_and_loss,
                self._after_update,
            )
            self.optimizer.sharded = self.is_distributed_loading_by_transformers
        return self.optimizer

    def _step_and_loss(self) -> tuple[int, torch.Tensor]:
        return self.state.global_step + 1, self.last_loss

    @torch.no_grad()
    def _after_update(self) -> None:
        if self.clamp_logit_scale:
            self.model.logit_scale.clamp_(0, MAX_LOGIT_SCALE)
        self.average.update(self.state.global_step + 1)

    def _clip_grad_norm(self, model: nn.Module) -> None:
        """Left to the optimizer's guarded step."""

    def _get_grad_norm(self, model: nn.Module, grad_norm=None) -> None:
        """Known after the step, see RunLogCallback."""
        self.last_lr = self._get_learning_rate()

    def check_finite(self) -> None:
        """Stops all ranks when a step of any was not finite; at log lines, and before every save and evaluation."""
        if isinstance(self.optimizer, GuardedOptimizer):
            self.optimizer.guard.check()

    # -- device and precision ----------------------------------------------------------------------------------------

    def create_accelerator_and_postprocess(self) -> None:
        # torch's new name for the option is not yet in accelerate
        warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
        super().create_accelerator_and_postprocess()
        if self.args.fp16:
            # accelerate leaves fp16 out on a CPU without a word and would train in fp32; torch can do it
            self.accelerator.native_amp = True
        self.accelerator.scaler = None  # the scale is the guarded step's

    def _save_scaler(self, output_dir: str) -> None:
        if self.scale.enabled and self.args.should_save:
            torch.save(self.scale.state_dict(), Path(output_dir) / SCALE_FILE)

    def _load_scaler(self, checkpoint: str | None) -> None:
        if checkpoint and (Path(checkpoint) / SCALE_FILE).is_file():
            self.scale.load_state_dict(checkpoint_file.load(Path(checkpoint) / SCALE_FILE))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """As `Trainer`; but rates, decay and betas are what this command says, and so is the schedule's length.

        The state that is loaded has those of the command that wrote it.
        """
        ours = [{key: value for key, value in g.items() if key != "params"} for g in self.optimizer.param_groups]
        super()._load_optimizer_and_scheduler(checkpoint)
        for group, options in zip(self.optimizer.param_groups, ours, strict=True):
            group.update(options)
        schedule = self.lr_scheduler
        if checkpoint and isinstance(schedule, LambdaLR):
            schedule.base_lrs = [options["initial_lr"] for options in ours]
            rates = [
                base * at(schedule.last_epoch) for base, at in zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)
            ]
            schedule._last_lr = rates
            for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
                group["lr"] = rate

    # -- evaluation and checkpoints ----------------------------------------------------------------------------------

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """In-batch loss and retrieval of the validation split (evaluation.py), on all ranks."""
        self.check_finite()
        try:
            with self.run_log.pause("evaluate"), self.average.in_place(), gathered(self.model):
                metrics = {f"{metric_key_prefix}_{key}": value for key, value in self.evaluator().items()}
        except Interrupted:
            self._stop_in_evaluation()
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _stop_in_evaluation(self) -> None:
        """Raises Preempted; the checkpoint says that the evaluation is still to be done."""
        if self.is_in_train:
            self.state.log_history.append({UNFINISHED: True, "step": self.state.global_step})
        self._save_checkpoint(self.model, None)
        raise self.run_log.stopped(self.state.global_step)

    def _get_output_dir(self, trial) -> str:
        """Where `Trainer` puts a checkpoint: aside, until all of it is there."""
        return str(Path(self.args.output_dir) / resume.STAGING)

    def _save_checkpoint(self, model: nn.Module, trial) -> None:
        """As `Trainer`, but large files are written behind the training; it gets its name only when it is whole."""
        self.check_finite()
        writer = self.run_log.writer
        with self.run_log.pause("save"), self.optimizer.gathered():
            writer.wait()  # for the one before, which is in the same folder until then
            distributed.barrier()  # on the main rank, which alone writes: nobody puts a file there before it is gone
            super()._save_checkpoint(model, trial)
            distributed.barrier()
            kept, self._kept = self._kept, {}
            if self.world.is_main:
                writer.submit(kept, partial(self._write_checkpoint, self.state.global_step))

    def _write_checkpoint(self, step: int, kept: dict[str, Any]) -> None:
        output_dir = Path(self.args.output_dir)
        folder = output_dir / resume.STAGING / f"checkpoint-{step}"
        super()._save(str(folder), kept["model"])
        checkpoint_file.save(kept["optimizer"], folder / OPTIMIZER_FILE)
        if "average" in kept:
            save_file(kept["average"], folder / AVERAGE_FILE)
        readable(folder)
        resume.publish(output_dir, step, self.run_facts, self.args.save_total_limit)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self.args.should_save:
            self._kept["optimizer"] = self.optimizer.state_dict()
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / "scheduler.pt")

    def _save(self, output_dir: str | None = None, state_dict: dict[str, torch.Tensor] | None = None) -> None:
        """A checkpoint gets the weights that are trained and their average; other folders what a user wants of them.

        That is the average, with LoRA's additions merged. All ranks call it.
        """
        folder = Path(output_dir or self.args.output_dir)
        if folder.parent.name != resume.STAGING:
            self.save_behind(folder)
            self.run_log.writer.wait()
            return
        if self.args.should_save:
            folder.mkdir(parents=True, exist_ok=True)
        self._kept["model"] = self._state()
        if self.average:
            self._kept["average"] = self._averaged()

    def save_behind(self, folder: Path, then: Callable[[], None] = lambda: None) -> None:
        """Has the model for users written into a folder while the training goes on, and `then` called on rank 0."""

        def write(kept: dict[str, torch.Tensor]) -> None:
            Trainer._save(self, str(folder), kept)
            readable(folder)
            then()

        with self.average.in_place():
            state = adapters.merged(self._state(), self.args.lora_scale)
            if self.args.should_save:
                self.run_log.writer.submit(state, write)

    def _averaged(self) -> dict[str, torch.Tensor]:
        """The averages of the trained weights, whole tensors by name; of a sharded model on rank 0 only."""
        if not self.args.sharded:
            return {name: value.contiguous() for name, value in self.average.values.items()}
        with self.average.in_place():
            state = self._state()
        return {name: state[name].contiguous() for name in self.average.values if name in state}

    def _state(self) -> dict[str, torch.Tensor]:
        """Whole tensors by name; of a sharded model on rank 0 only."""
        return sharding.model_state(self.model) if self.args.sharded else self.model.state_dict()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """As `Trainer`, and the average; one that the checkpoint lacks begins with its weights."""
        folder = Path(resume_from_checkpoint)
        if self.args.sharded:
            sharding.load_model(self.model, load_file(folder / "model.safetensors"))
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        self.average = WeightAverage(self.model, self.average.decay)
        if self.average and (folder / AVERAGE_FILE).is_file():
            self.average.load(load_file(folder / AVERAGE_FILE))
