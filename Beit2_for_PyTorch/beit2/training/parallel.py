"""One replica of the model among others: alone, under DDP, or sharded (FSDP2); its checkpoints."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import register_fsdp_forward_method
from torch.nn.parallel import DistributedDataParallel

from beit2.model.initialization import materialize
from beit2.model.masked_image_model import MaskedImageModel
from beit2.training import checkpoints
from common import checkpoint_file, distributed, shards
from common.checkpoint.background_write import BackgroundWriter
from common.checkpoint_file import CheckpointError
from common.distributed import World
from common.errors import UsageError
from common.update import LossScale


class Replica:
    """A model on this rank.

    Attributes:
        model: the model itself, whose parameters the optimizer has.
        wrapped: what is called: the model, or DDP around it.
    """

    def __init__(self, model: nn.Module, world: World, static_graph: bool = False):
        self.model, self.world = model, world
        self.wrapped = data_parallel(model, world, static_graph)
        self.parameter_count = sum(p.numel() for p in model.parameters() if p.requires_grad)

    def save(
        self,
        options: argparse.Namespace,
        optimizer: torch.optim.Optimizer,
        scale: LossScale,
        progress: dict[str, Any],
        epoch: int,
        numbered: bool,
        extra: dict[str, Any],
        writer: BackgroundWriter,
    ) -> None:
        """Has checkpoint.pth written, and with `numbered` checkpoint-<epoch>.pth, each whole or not at all.

        Every rank calls it.
        """
        if not self.world.is_main:
            return
        state = checkpoints.training_state(self.model, optimizer, scale, options, progress, epoch, **extra)
        names = [checkpoints.LATEST, *([f"checkpoint-{epoch}.pth"] if numbered else [])]

        def write(kept: dict[str, Any]) -> None:
            for name in names:
                checkpoint_file.save(kept, Path(options.output_dir) / name)

        writer.submit(state, write)

    def load(
        self, path: Path, optimizer: torch.optim.Optimizer, scale: LossScale, steps: int
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Restores a checkpoint, sharded or not, as this replica is or the other one.

        Returns its progress, and what it holds besides. Every rank calls it.
        """
        if not path.is_dir():
            return checkpoints.load_training_state(path, self.model, optimizer, scale, steps)
        try:
            progress = checkpoints.fit_progress(shards.load_progress(path), steps, path)
            scale.load_state_dict(progress.pop("scaler", None) or {})
            shards.load_shards(path, optimizer, self.model)
        except CheckpointError as error:
            raise UsageError(str(error)) from error
        own = {name: progress[name] for name in ("step", "sums", "counts") if name in progress}
        return own, {name: value for name, value in progress.items() if name not in own}


class ShardedReplica(Replica):
    """A model spread over the ranks: FSDP2 shards, fp32 masters, gathered for compute in the run's precision.

    Its checkpoints are the folder `checkpoint-sharded` to resume from, on any number of ranks, and with `numbered` one
    plain checkpoint-<epoch>.pth with the whole model.
    """

    def __init__(self, model: MaskedImageModel, world: World, precision: str, seed: int):
        self.model = self.wrapped = model
        self.world = world
        self.parameter_count = sum(p.numel() for p in model.parameters() if p.requires_grad)
        blocks = (*model.blocks, *getattr(model, "cls_pt_layers", ()))
        # as under DDP norms and the residual stream are fp32: in bf16 a layer scale of 1e-5 adds less than its last bit
        norms = [[block.norm1, block.norm2] for block in blocks]
        norms += [[module] for name, module in model.named_children() if isinstance(module, nn.LayerNorm)]
        shards.shard(model, blocks, world, precision, fp32=norms if precision != "fp32" else ())
        register_fsdp_forward_method(model, "encode")
        materialize(model, world.device, seed)

    def save(self, options, optimizer, scale, progress, epoch, numbered, extra, writer) -> None:
        folder = Path(options.output_dir)
        rest = {"scaler": scale.state_dict(), "args": checkpoints.plain_options(options), **extra}
        shards.save_shards(folder / checkpoints.SHARDED, progress | rest, optimizer, self.model, writer)
        if numbered:
            state = shards.whole_state(self.model)  # on rank 0; empty elsewhere
            if self.world.is_main:
                content = {"model": state, "epoch": epoch, "args": checkpoints.plain_options(options)}
                writer.submit(content, lambda kept: checkpoint_file.save(kept, folder / f"checkpoint-{epoch}.pth"))


def new_replica(model: MaskedImageModel, world: World, options: argparse.Namespace, precision: str) -> Replica:
    """A model from the meta device with its storage and its initial weights, which are drawn from --seed."""
    model.activation_checkpointing = options.activation_checkpointing
    if options.parallel == "fsdp":
        return ShardedReplica(model, world, precision, options.seed)
    materialize(model, world.device, options.seed)
    # every parameter gets a gradient in every step, in the same order
    return Replica(model, world, static_graph=options.update_freq == 1)


def data_parallel(model: nn.Module, world: World, static_graph: bool = False) -> nn.Module:
    """The model under DDP, or itself when this is the only process. Buffers are the same everywhere by themselves."""
    if not distributed.is_distributed():
        return model
    ids = None if world.device.type == "cpu" else [world.device.index]
    return DistributedDataParallel(
        model, ids, forward_sync_buffers=False, gradient_as_bucket_view=True, static_graph=static_graph
    )
