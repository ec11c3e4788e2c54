"""Training and evaluation of a configured run, in the order in which it happens."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from common import checkpoint_file, shards
from common import device as devices
from common.apex_options import ApexScaler, gradient_scaler
from common.distributed import World, all_reduce_mean, barrier, broadcast_object, gather_objects, process_group
from common.errors import UsageError
from common.run_log import RunLog
from vit import checkpoint, download, npu_patches
from vit import config as configuration
from vit.checkpoint import RunShape, TrainState
from vit.config import Config
from vit.data import Data, open_evaluation_data, open_training_data, training_batches
from vit.evaluate import Score, evaluate_model
from vit.finite_guard import FiniteGuard
from vit.labels import load_class_names, save_class_names
from vit.loader import Batch, to_model_input
from vit.metrics import soft_target_cross_entropy
from vit.mixup import MixupConfig, apply_mix, draw_mix
from vit.model import create_model
from vit.optim import build_ema, build_optimizer, set_learning_rate
from vit.schedule import learning_rate_at, scaled_lr
from vit.weights import HeadPolicy, load_weights

NETWORK = "ViT_for_PyTorch"


@dataclass
class Run:
    """The objects of one training run."""

    config: Config
    world: World
    data: Data
    shape: RunShape
    total_steps: int
    model: VisionTransformer  # the plain module: what is saved and evaluated
    trained: nn.Module  # the same weights, compiled and wrapped for several ranks
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler | ApexScaler
    ema: ModelEmaV3 | None
    guard: FiniteGuard
    state: TrainState


def train(config: Config) -> dict[str, Any]:
    """Trains, fine-tunes or resumes as configured; returns the keys of the result file."""
    with process_group(config.device) as world:
        devices.seed_everything(config.seed)
        resumed_from, config = to_resume(config, world)
        data = open_training_data(config, world)
        model = build(config, len(data.class_names), world, head="new")
        run = prepare(config, world, data, model)
        if resumed_from is not None:
            resume(run, resumed_from)
        with open_log(run, resumed_from) as log:
            batches = training_batches(data.training, config.accumulate, run.state.step)
            score = None
            for step in range(run.state.step, run.total_steps):
                epoch = step / run.shape.steps_per_epoch
                lr = learning_rate(config, run.shape, epoch)
                set_learning_rate(run.optimizer, lr)
                loss = forward_backward(run, step, batches, log)
                grad_norm = update(run, step, loss)
                log.step(step + 1, run.shape.global_batch, loss, lr, grad_norm, epoch=epoch)
                run.state.step = step + 1
                if is_due(run, config.log_every):
                    run.guard.check()
                if config.do_eval and is_due(run, config.eval_every * run.shape.steps_per_epoch):
                    score = evaluate_epoch(run, log)  # before saving: the checkpoint knows the best score so far
                if is_due(run, config.save_every or run.shape.steps_per_epoch):
                    save(run, log)
            return finish(run, log, score)


def prepare(config: Config, world: World, data: Data, model: VisionTransformer) -> Run:
    """Optimizer, scaler, weight average and the wrapped model of a run that is at its beginning."""
    shape = RunShape(
        global_batch=config.batch_size * config.accumulate * world.size,
        steps_per_epoch=data.training.steps_per_epoch // config.accumulate,
        num_classes=len(data.class_names),
        seed=config.seed,
    )
    if shape.steps_per_epoch == 0:
        raise UsageError(
            f"{config.data.train_dataset_dir}: {len(data.training.folder)} pictures do not fill one global batch of "
            f"{shape.global_batch} (batch_size x accumulate x ranks); lower batch_size or accumulate"
        )
    options = config.optimizer
    if world.is_main and options.warmup_epochs >= config.epochs:
        print(f"warning: the run ends inside its warm-up ({config.epochs} of {options.warmup_epochs:g} epochs)")
    ema = build_ema(model, options.ema_decay)
    trained = over_ranks(config, world, model, ema)  # before the optimizer, which must see the shards
    optimizer = build_optimizer(
        model,
        weight_decay=options.weight_decay,
        layer_decay=options.layer_decay,
        betas=(options.beta1, options.beta2),
        eps=options.eps,
    )
    steps = config.epochs * shape.steps_per_epoch
    return Run(
        config=config,
        world=world,
        data=data,
        shape=shape,
        total_steps=min(steps, config.max_steps or steps),
        model=model,
        trained=trained,
        optimizer=optimizer,
        scaler=gradient_scaler(config.amp_backend, model, optimizer, world.device, config.precision, config.loss_scale),
        ema=ema,
        guard=FiniteGuard(optimizer, world.device),
        state=TrainState(),
    )


def over_ranks(config: Config, world: World, model: VisionTransformer, ema: ModelEmaV3 | None) -> nn.Module:
    """The model as it is trained: with --parallel fsdp in shards, in place; on several ranks otherwise under DDP."""
    if config.parallel == "fsdp":
        for module in (model, ema.module) if ema else (model,):
            shards.shard(module, module.blocks, world, config.precision)
        return torch.compile(model) if config.model.compile else model
    trained = torch.compile(model) if config.model.compile else model
    if world.size == 1:
        return trained
    ids = None if world.device.type == "cpu" else [world.device.index]
    return DistributedDataParallel(trained, device_ids=ids, gradient_as_bucket_view=True)


def to_resume(config: Config, world: World) -> tuple[Path | None, Config]:
    """The checkpoint to go on from, if any, and the configuration that keeps its global batch on these ranks.

    On another number of ranks than before `accumulate` makes up for it, where the numbers allow; where they do not, and
    where batch_size or accumulate were changed, `checkpoint.restore` refuses.
    """
    path, accumulate = None, config.accumulate
    if world.is_main:
        path = checkpoint.find(config.resume_training, config.output_dir)
        if path is not None:
            accumulate = checkpoint.accumulate_on(path, config.batch_size, config.accumulate, world.size)
    path, accumulate = broadcast_object((path, accumulate))  # all ranks must take the same ones
    if accumulate != config.accumulate and world.is_main:
        print(f"note: accumulate is {accumulate}, not {config.accumulate}: that keeps the global batch of {path}")
    return path, replace(config, accumulate=accumulate)


def resume(run: Run, path: Path) -> None:
    """Puts the run where its checkpoint left off."""
    ema = run.ema.module if run.ema else None
    run.state = checkpoint.restore(path, run.shape, run.model, run.optimizer, run.scaler, ema)
    run.data.training.bad_files.load_state_dict(run.state.bad_files)


def open_log(run: Run, resumed_from: Path | None) -> RunLog:
    """The run's log; a fresh run moves the files of an earlier one in the same folder aside."""
    config = run.config
    if run.world.is_main:
        where = f"resuming from {resumed_from} at step {run.state.step}" if resumed_from else "starting"
        print(
            f"{where}: {config.model.name}, {len(run.data.training.folder)} pictures, {run.shape.num_classes} classes, "
            f"{run.total_steps} steps of {run.shape.global_batch}, {config.precision} on "
            f"{run.world.size} x {devices.describe(run.world.device)}",
            flush=True,
        )
    return RunLog(
        config.output_dir,
        run.world,
        NETWORK,
        config.batch_size,
        config.case_kind,
        total_steps=run.total_steps,
        log_every=config.log_every,
        resume=resumed_from is not None,
        profile=config.profile,
    )


def learning_rate(config: Config, shape: RunShape, epoch: float) -> float:
    """The rate of the top layer at a fractional epoch."""
    return learning_rate_at(
        epoch,
        lr=scaled_lr(config.optimizer.base_lr, shape.global_batch),
        min_lr=config.optimizer.min_lr,
        warmup_epochs=config.optimizer.warmup_epochs,
        epochs=config.epochs,
    )


def forward_backward(run: Run, step: int, batches: Iterator[Batch], log: RunLog) -> Tensor:
    """Accumulates the gradient of one optimizer step; returns the mean loss over all ranks, a scalar on the device."""
    config, device = run.config, run.world.device
    mean_loss = torch.zeros((), device=device)
    for micro in range(config.accumulate):
        with log.data_wait():
            batch = next(batches)
        micro_step = step * config.accumulate + micro
        images, target = to_model_input(batch, device)  # [B, 3, H, W], [B]
        images, target = mix(run, images, target, micro_step)  # [B, 3, H, W], [B, C]
        devices.seeded(config.seed, micro_step, run.world.rank)  # drop path
        with no_gradient_exchange(run, micro + 1 < config.accumulate):
            with devices.autocast(device, config.precision):
                logits = run.trained(images)  # [B, C]
            loss = soft_target_cross_entropy(logits, target) / config.accumulate
            run.scaler.scale(loss).backward()
        mean_loss += loss.detach()
    return all_reduce_mean(mean_loss)


def mix(run: Run, images: Tensor, target: Tensor, micro_step: int) -> tuple[Tensor, Tensor]:
    """Mixup or CutMix: images [B, 3, H, W], class indices [B] -> the same, probabilities [B, C]."""
    options = run.config.data
    settings = MixupConfig(
        options.mixup, options.cutmix, options.mixup_prob, options.mixup_switch_prob, options.label_smoothing
    )
    draw = draw_mix(settings, *images.shape[2:], seed=run.config.seed, step=micro_step, rank=run.world.rank)
    return apply_mix(images, target, draw, run.shape.num_classes, options.label_smoothing)


@contextlib.contextmanager
def no_gradient_exchange(run: Run, wanted: bool) -> Iterator[None]:
    """Between accumulated micro-batches the ranks keep their gradients to themselves."""
    if run.config.parallel == "fsdp":
        run.model.set_requires_gradient_sync(not wanted)
    ddp = isinstance(run.trained, DistributedDataParallel)
    with run.trained.no_sync() if wanted and ddp else contextlib.nullcontext():
        yield


def update(run: Run, step: int, loss: Tensor) -> Tensor:
    """Clips, checks and applies the accumulated gradient; returns its norm before clipping, a scalar on the device."""
    run.scaler.unscale_(run.optimizer)
    parameters = [p for p in run.model.parameters() if p.grad is not None]
    grad_norm = nn.utils.get_total_norm([p.grad for p in parameters])
    if shards.is_sharded(grad_norm):
        grad_norm = grad_norm.full_tensor()
    if run.config.optimizer.clip_grad > 0:
        nn.utils.clip_grads_with_norm_(parameters, run.config.optimizer.clip_grad, grad_norm)
    if run.scaler.is_enabled():
        run.guard.note(step + 1, loss)
    else:
        run.guard.protect(step + 1, loss, grad_norm)
    run.scaler.step(run.optimizer)
    run.scaler.update()
    run.optimizer.zero_grad(set_to_none=True)
    if run.ema:
        run.ema.update(run.model)
    return grad_norm


def is_due(run: Run, every: int) -> bool:
    return run.state.step % every == 0 or run.state.step == run.total_steps


def save(run: Run, log: RunLog, name: str = "") -> None:
    """Writes the checkpoint of this step, or `name` for evaluation, never with non-finite weights; drops old ones."""
    run.guard.check()
    state = replace(run.state, bad_files=bad_files(run))
    sharded = run.config.parallel == "fsdp"
    if not (sharded or run.world.is_main):
        return
    folder = checkpoint.folder_of(run.config.output_dir)
    options = configuration.as_dict(run.config)
    ema = run.ema.module if run.ema else None
    with log.pause("checkpoint"):
        if run.world.is_main:
            save_class_names(folder, run.data.class_names)
        if sharded and name:
            checkpoint.save_whole(folder / name, state, run.shape, options, run.model, ema)
            return
        path = folder / (name or f"checkpoint-{run.state.step}{'' if sharded else '.pt'}")
        write = checkpoint.save_sharded if sharded else checkpoint.save
        write(path, state, run.shape, options, run.model, run.optimizer, run.scaler, ema)
        if run.world.is_main:
            checkpoint_file.keep_newest(folder, run.config.keep_checkpoints, "checkpoint-*.pt")
            shards.keep_newest_shards(folder, run.config.keep_checkpoints)


def bad_files(run: Run) -> dict[str, str]:
    """Broken training pictures met so far on any rank, each with what is wrong."""
    merged: dict[str, str] = {}
    for found in gather_objects(run.data.training.bad_files.state_dict()):
        merged |= found
    return merged


def evaluate_epoch(run: Run, log: RunLog) -> Score:
    """Scores the model (its weight average if there is one) and keeps it when it is the best so far."""
    with log.pause("evaluate"):
        model = run.ema.module if run.ema else run.model
        batches = run.data.evaluation
        if run.config.parallel == "fsdp":
            batches = batches.of_equal_length()
        score = evaluate_model(model, batches, run.world, run.config.precision)
    log.record(
        run.state.step,
        "eval",
        top1=score.top1_percent,
        top5=score.top5_percent,
        loss=score.loss,
        correct=score.top1,
        count=score.count,
    )
    if score.top1_percent > run.state.best_top1:
        run.state.best_top1 = score.top1_percent
        save(run, log, "best.pt")
    return score


def finish(run: Run, log: RunLog, score: Score | None) -> dict[str, Any]:
    """The result of a run that came to its end."""
    keys: dict[str, Any] = {"BadImages": len(bad_files(run))}
    if score is not None:
        log.info(f"evaluation: {score}")
        keys |= {"Top5Accuracy": score.top5_percent, "BestAccuracy": run.state.best_top1, "EvalCount": score.count}
    return log.finish(accuracy=score.top1_percent if score else None, **keys)


def evaluate(config: Config) -> dict[str, Any]:
    """Scores `config.load_checkpoint` on the evaluation folder; returns counts, percentages and the mean loss."""
    with process_group(config.device) as world:
        names = load_class_names(config.load_checkpoint) if Path(config.load_checkpoint).exists() else None
        data = open_evaluation_data(config, world, class_names=names)
        model = build(config, len(data.class_names), world, head="required")
        # resume: an evaluation adds to a folder and moves nothing of a training run aside
        with RunLog(
            config.output_dir,
            world,
            f"{NETWORK}_eval",
            config.batch_size,
            config.case_kind,
            evaluation=True,
            skip_steps=1,
            profile=config.profile,
        ) as log:
            score = evaluate_model(model, counted(data.evaluation, log, world), world, config.precision)
            log.info(f"ViT: Top1 Accuracy = {{'Top1 Accuracy': {score.top1 / score.count}}}; {score}")
            keys = {"Top1": score.top1, "Top5": score.top5, "Count": score.count, "Top5Accuracy": score.top5_percent}
            return log.finish(accuracy=score.top1_percent, loss=score.loss, **keys)


def counted(batches: Iterable[Batch], log: RunLog, world: World) -> Iterator[Batch]:
    """Counts evaluated pictures of all ranks in FPS; shares differ by less than a batch."""
    for batch in batches:
        yield batch
        log.count(len(batch.targets) * world.size)


def build(config: Config, num_classes: int, world: World, head: HeadPolicy) -> VisionTransformer:
    """The configured model on its device, with the weights of `load_checkpoint` if one is given."""
    overrides = {} if config.model.img_size is None else {"img_size": config.model.img_size}
    model = create_model(
        config.model.name,
        num_classes,
        global_pool=config.model.global_pool,
        drop_path=config.model.drop_path,
        init=config.model.init,
        **overrides,
    )
    if config.load_checkpoint:
        path = local_checkpoint(config.load_checkpoint, world)
        missing, unexpected = load_weights(model, path, head=head)
        if world.is_main:
            print(f"loaded {path}: missing {missing or 'nothing'}, not used {unexpected or 'nothing'}", flush=True)
    elif head == "required":
        raise UsageError("--load_checkpoint is required: which weights are to be evaluated?")
    model.set_grad_checkpointing(config.model.gradient_checkpointing)
    if config.parallel == "ddp" or head == "required":  # else it goes to the device in shards
        model.to(world.device)
    npu_patches.apply(model, world.device)
    return model


def local_checkpoint(name_or_path: str, world: World | None = None) -> Path:
    """A file as it is; a known name such as mae_vit_base_p16 is downloaded first, by the main rank alone."""
    if Path(name_or_path).exists() or name_or_path.removeprefix("mindspore/") not in download.PUBLISHED:
        return Path(name_or_path)
    if world is None or world.is_main:
        path = download.fetch(name_or_path)
    barrier()
    return path if world is None or world.is_main else download.fetch(name_or_path)
