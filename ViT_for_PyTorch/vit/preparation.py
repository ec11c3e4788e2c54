"""The objects of a run: its model on its device, optimizer and loss scale, and the checkpoint it goes on from."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from timm.utils import ModelEmaV3
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from common import checkpoint_file, shards
from common import device as devices
from common.distributed import World, barrier, broadcast_object
from common.errors import UsageError
from common.model.fp8 import use_fp8
from common.run import run_folder
from common.update import GuardedStep, LossScale, loss_scale
from vit import cpu_patches, npu_patches
from vit.config import run_config as configuration
from vit.config.run_config import Config, ModelConfig
from vit.data.augment import Augmentation
from vit.find_weights import checkpoint_of
from vit.model import lora
from vit.model.flops import flops_per_image
from vit.model.vision_transformer import ClassifyingViT, ViTConfig
from vit.model.vision_transformer import build as build_model
from vit.training import checkpoint
from vit.training.checkpoint import RunShape, TrainState
from vit.training.data import Data
from vit.training.optim import build_ema, build_optimizer
from vit.weights import download
from vit.weights.loading import HeadPolicy, load_weights

# what a user changes on purpose between a run and its continuation; said in one line
MAY_CHANGE = ("optimizer.base_lr", "optimizer.min_lr", "optimizer.warmup_epochs", "epochs")
_NO_SHAPE = {"drop_path_rate", "norm_eps", "mean", "std", "interpolation", "crop_ratio"}
# shapes of the weights or of the optimizer's groups
FIXED = ("train", "lora", *(f"model.{field.name}" for field in fields(ViTConfig) if field.name not in _NO_SHAPE))


# of an optimizer's groups; rates are set at every step
FROM_THIS_RUN = ("weight_decay", "betas", "eps", "lr_scale")


@dataclass
class Run:
    """The objects of one training run."""

    config: Config
    world: World
    data: Data
    shape: RunShape
    total_steps: int
    model: ClassifyingViT  # the plain module: what is saved and evaluated
    trained: nn.Module  # the same weights, compiled and wrapped for several ranks
    optimizer: torch.optim.Optimizer
    scale: LossScale
    ema: ModelEmaV3 | None
    update: GuardedStep
    state: TrainState
    identity: dict[str, Any]  # what its checkpoints are of
    class_weights: torch.Tensor | None = None  # [C] of the loss; None = all alike
    flops: float = 0.0  # of a step, over all ranks


def prepare(config: Config, world: World, data: Data, model: ClassifyingViT) -> Run:
    """Optimizer, loss scale, weight average and the wrapped model of a run that is at its beginning."""
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
    if world.is_main and config.early_stop and not config.do_eval:
        print(f"warning: early_stop={config.early_stop} has no effect without evaluations (do_eval=false)")
    freeze(model, config.model)
    kind = config.model.train
    if config.model.fp8:
        _use_fp8(config, world, model)
    flops = flops_per_image(model, head_only=kind == "head", frozen=kind == "lora")
    ema = build_ema(model, options.ema_decay)
    trained = over_ranks(config, world, model, ema)  # before the optimizer, which must see the shards
    optimizer = build_optimizer(
        model,
        weight_decay=options.weight_decay,
        layer_decay=options.layer_decay,
        betas=(options.beta1, options.beta2),
        eps=options.eps,
    )
    scale = loss_scale(world.device, config.precision, config.loss_scale)
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
        scale=scale,
        ema=ema,
        update=GuardedStep(
            optimizer,
            [parameter for parameter in model.parameters() if parameter.requires_grad],
            scale,
            clip_norm=options.clip_grad,
            after=(lambda: ema.update(model)) if ema else None,
            remedy="Lower the learning rate, set optimizer.clip_grad, or use bf16 or fp32",
        ),
        state=TrainState(),
        identity=identity_of(config, data, model),
        class_weights=balanced_weights(data).to(world.device) if config.class_weights == "balanced" else None,
        flops=flops * shape.global_batch,
    )


def _use_fp8(config: Config, world: World, model: ClassifyingViT) -> None:
    """Products of the blocks in fp8; UsageError with what it was not tried or cannot be."""
    if config.model.compile:
        raise UsageError("model.fp8=true: not with model.compile=true, with which it was not tried; leave one out")
    if config.model.train == "lora":
        raise UsageError("model.fp8=true: not with model.train=lora, whose additions are too narrow; leave one out")
    use_fp8(world.device, config.precision, "model.fp8=true", model.blocks)


def balanced_weights(data: Data) -> torch.Tensor:
    """float32 [C]: the mean number of pictures of a class / the class's own, so that rare classes count as much."""
    counts = torch.bincount(torch.tensor(data.training.folder.targets), minlength=len(data.class_names))
    return counts.float().mean() / counts


def freeze(model: ClassifyingViT, options: ModelConfig) -> None:
    """Leaves only what `options.train` names to be trained: all, the head alone on features that stay as they are, or
    the head and LoRA's additions."""
    if options.train == "lora":
        lora.add(model, options.lora_rank, options.lora_alpha, options.lora_layers, options.lora_also)
    elif options.train == "head":
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.startswith("head."))


def over_ranks(config: Config, world: World, model: ClassifyingViT, ema: ModelEmaV3 | None) -> nn.Module:
    """The model as it is trained: with --parallel fsdp in shards, in place; on several ranks otherwise under DDP."""
    if config.model.compile:
        devices.require_eager(world.device, "model.compile=true")
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
        path = checkpoint.find(config.resume_training or ("auto" if config.replay else ""), config.output_dir)
    path = run_folder.agree_on(path, world)
    if world.is_main and path is not None:
        accumulate = checkpoint.accumulate_on(path, config.batch_size, config.accumulate, world.size)
    accumulate = broadcast_object(accumulate)
    if accumulate != config.accumulate and world.is_main:
        print(f"note: accumulate is {accumulate}, not {config.accumulate}: that keeps the global batch of {path}")
    return path, replace(config, accumulate=accumulate)


def resume(run: Run, path: Path) -> None:
    """Puts the run where its checkpoint left off; UsageError where that is another run's (`run_folder.compare`)."""
    content = checkpoint.read_values(path)
    if lora := (content.get("identity") or {}).get("lora"):
        lora.setdefault("lora_also", "")  # an earlier version trained the additions and the head alone
    accepted = run.config.accept_changes
    note = run_folder.compare(
        path, content.get("identity"), run.identity, may_change=MAY_CHANGE, accepted=accepted, fixed=FIXED
    )
    if note and run.world.is_main:
        print(note, flush=True)
    ema = run.ema.module if run.ema else None
    chosen = [{key: group[key] for key in FROM_THIS_RUN} for group in run.optimizer.param_groups]
    run.state = checkpoint.restore(path, content, run.shape, run.model, run.optimizer, run.scale, ema)
    for group, own in zip(run.optimizer.param_groups, chosen, strict=True):
        group.update(own)  # what was accepted as changed takes effect
    run.data.training.bad_files.load_state_dict(run.state.bad_files)
    is_own = path.resolve().parent == checkpoint.folder_of(run.config.output_dir).resolve()
    if run.world.is_main and is_own and not run.config.replay:  # another run's folder is left alone
        for old in checkpoint_file.set_aside_newer(path, "checkpoint-*"):
            print(f"note: {old} is of a later step than {path.name}: moved to {path.parent / 'earlier'}", flush=True)


def identity_of(config: Config, data: Data, model: ClassifyingViT) -> dict[str, Any]:
    """What a checkpoint is of, by value: its data, model, recipe and precision."""
    folder, options = data.training.folder, configuration.as_dict(config)
    names = [path.removeprefix(os.path.join(folder.root, "")) for path in folder.paths]
    recipe = {key: options["data"][key] for key in asdict(Augmentation())}
    seen = {key: value for key, value in dict(model.config).items() if key != "batch_size"}
    kept: dict[str, Any] = {"data": run_folder.listing_identity(names, folder.targets, folder.classes, folder.root)}
    kept |= {"model": seen, "augmentation": recipe, "optimizer": options["optimizer"], "train": config.model.train}
    if config.model.train == "lora":
        kept["lora"] = {key: value for key, value in options["model"].items() if key.startswith("lora_")}
    kept["precision"] = f"{config.precision}{' with fp8' if config.model.fp8 else ''}"
    return kept | {key: options[key] for key in ("epochs", "class_weights")}


def build(
    config: Config, description: ViTConfig, weights: Path | None, world: World, head: HeadPolicy
) -> ClassifyingViT:
    """The described model on its device, with weights if there are any."""
    model = build_model(description, init=config.model.init)
    if weights is not None:
        missing, unexpected = load_weights(model, weights, head=head)
        if world.is_main:
            print(f"loaded {weights}: missing {missing or 'nothing'}, not used {unexpected or 'nothing'}", flush=True)
    model.set_grad_checkpointing(config.model.gradient_checkpointing)
    if config.parallel == "ddp" or head == "required":  # else it goes to the device in shards
        model.to(world.device)
    npu_patches.apply(model, world.device)
    cpu_patches.apply(model, world.device)
    return model


def local_checkpoint(name_or_path: str, world: World) -> Path:
    """A file as it is, of a run's folder the best; a name such as mae_vit_base_p16 is downloaded by the main rank."""
    if Path(name_or_path).exists():
        return checkpoint_of(name_or_path)
    if name_or_path.removeprefix("mindspore/") not in download.PUBLISHED:
        return Path(name_or_path)
    if world.is_main:
        download.fetch(name_or_path)
    barrier()
    return download.fetch(name_or_path)
