"""One replica of the model among others: alone, under DDP, or sharded (FSDP2); its checkpoints and memory."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from beit2 import training_files
from beit2.initialization import materialize
from beit2.pretraining_model import MaskedImageModel
from common import checkpoint_file, distributed, shards
from common.apex_options import restore_scale
from common.checkpoint_file import CheckpointError
from common.distributed import World
from common.errors import UsageError


class Replica:
    """The model on this rank.

    Attributes:
        model: the model itself, whose parameters the optimizer has.
        wrapped: what is called: the model, or DDP around it.
        sharded: whether parameters are FSDP2 shards (fp32 masters, gathered for compute in the run's precision).

    Args:
        model: on the meta device; here it gets its storage and its initial weights, drawn from the options' seed.
        options: parallel, activation_checkpointing, update_freq and seed are read.
    """

    def __init__(self, model: MaskedImageModel, world: World, options: argparse.Namespace, precision: str):
        self.world, self.sharded = world, options.parallel == "fsdp"
        self.parameter_count = sum(p.numel() for p in model.parameters() if p.requires_grad)
        model.activation_checkpointing = options.activation_checkpointing
        self.model = self.wrapped = model
        if self.sharded:
            shards.shard(model, (*model.blocks, *getattr(model, "cls_pt_layers", ())), world, precision)
        materialize(model, world.device, options.seed)
        if not self.sharded:
            # every parameter gets a gradient in every step, in the same order
            self.wrapped = data_parallel(model, world, static_graph=options.update_freq == 1)

    def save(
        self,
        options: argparse.Namespace,
        optimizer: torch.optim.Optimizer,
        scaler: torch.amp.GradScaler,
        progress: dict[str, Any],
        steps_per_epoch: int,
        numbered: bool,
    ) -> None:
        """Writes the state. Every rank calls it.

        Sharded: the folder `checkpoint-sharded` to resume from; and with `numbered` one plain checkpoint-<epoch>.pth
        with the whole model.
        """
        folder = Path(options.output_dir)
        if self.sharded:
            rest = {"scaler": scaler.state_dict(), **training_files.run_shape(steps_per_epoch)}
            shards.save_shards(folder / training_files.SHARDED, progress | rest, optimizer, self.model)
            if numbered:
                state = shards.whole_state(self.model)  # on rank 0; empty elsewhere
                if self.world.is_main:
                    epoch = progress["step"] // steps_per_epoch - 1
                    content = {"model": state, "epoch": epoch, "args": training_files.plain_options(options)}
                    checkpoint_file.save(content, folder / f"checkpoint-{epoch}.pth")
        else:
            training_files.save_whole(
                self.world, options, self.model, optimizer, scaler, progress, steps_per_epoch, numbered
            )

    def load(
        self, path: Path, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, steps_per_epoch: int
    ) -> dict[str, Any]:
        """Restores a checkpoint and returns its progress. Every rank calls it."""
        if path.is_dir() != self.sharded:
            kind = "a sharded checkpoint: add --parallel fsdp" if path.is_dir() else "not sharded: use --parallel ddp"
            raise UsageError(f"{path} is {kind}, or start anew with --no_auto_resume")
        if self.sharded:
            return load_shards(self.model, optimizer, scaler, path, steps_per_epoch)
        return training_files.load_training_state(path, self.model, optimizer, scaler, steps_per_epoch)


def data_parallel(model: nn.Module, world: World, static_graph: bool = False) -> nn.Module:
    """The model under DDP, or itself when this is the only process. Buffers are the same everywhere by themselves."""
    if not distributed.is_distributed():
        return model
    ids = None if world.device.type == "cpu" else [world.device.index]
    return DistributedDataParallel(
        model, ids, forward_sync_buffers=False, gradient_as_bucket_view=True, static_graph=static_graph
    )


def load_shards(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    folder: Path,
    steps_per_epoch: int,
) -> dict[str, Any]:
    """Restores the folder that `Replica.save` wrote, on any number of ranks, and returns the progress.

    Raises:
        UsageError: another model's, or in the middle of an epoch of another number of steps.
    """
    try:
        progress = training_files.fit_progress(shards.load_progress(folder), steps_per_epoch, folder)
        scaling = progress.pop("scaler", None)
        if scaling and scaler.is_enabled():
            restore_scale(scaler, scaling)
        shards.load_shards(folder, optimizer, model)
    except CheckpointError as error:
        raise UsageError(str(error)) from error
    return progress
