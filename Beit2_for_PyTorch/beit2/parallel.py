"""One replica of the model among others: alone, under DDP, or sharded (FSDP2); its checkpoints and memory."""

from __future__ import annotations

import argparse
import os
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from beit2 import training_files
from beit2.initialization import materialize
from beit2.pretraining_model import MaskedImageModel
from common import checkpoint_file, distributed
from common.device import UsageError
from common.distributed import World

_COMPUTE = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


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
            if not distributed.is_distributed():
                raise UsageError("--parallel fsdp shards over ranks: start with torchrun, e.g. --nproc_per_node 8")
            shard(model, world, precision)
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
            rest = {"scaler": scaler.state_dict(), "steps_per_epoch": steps_per_epoch}
            save_shards(self.model, optimizer, progress | rest, folder / training_files.SHARDED)
            if numbered:
                whole = StateDictOptions(full_state_dict=True, cpu_offload=True)
                state = get_model_state_dict(self.model, options=whole)  # on rank 0; empty elsewhere
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


def shard(model: MaskedImageModel, world: World, precision: str) -> None:
    """FSDP2: every block a unit, the rest the root unit; fp32 masters and gradient sums, compute in `precision`.

    The model is on the meta device: neither host nor card ever holds all of it.
    """
    mesh = init_device_mesh(world.device.type, (world.size,))
    policy = MixedPrecisionPolicy(param_dtype=_COMPUTE[precision], reduce_dtype=torch.float32)
    for block in (*model.blocks, *getattr(model, "cls_pt_layers", ())):
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)


def save_shards(model: nn.Module, optimizer: torch.optim.Optimizer, progress: dict[str, Any], folder: Path) -> None:
    """Every rank writes its shards into a new folder, which then takes the old one's name."""
    writing = folder.with_name(f".{folder.name}.writing")
    if distributed.rank() == 0:
        shutil.rmtree(writing, ignore_errors=True)
    distributed.barrier()
    model_state, optimizer_state = get_state_dict(model, optimizer)
    dcp.save({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=writing)
    if distributed.rank() == 0:
        checkpoint_file.save(progress, writing / "progress.pt")
        old = folder.with_name(f".{folder.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        if folder.exists():
            os.replace(folder, old)
        os.replace(writing, folder)
        shutil.rmtree(old, ignore_errors=True)
    distributed.barrier()


def load_shards(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    folder: Path,
    steps_per_epoch: int,
) -> dict[str, Any]:
    """Restores `save_shards`' folder, on any number of ranks, and returns the progress.

    Raises:
        UsageError: another model's, or in the middle of an epoch of another number of steps.
    """
    progress = training_files.fit_progress(checkpoint_file.load(folder / "progress.pt"), steps_per_epoch, folder)
    scaling = progress.pop("scaler", None)
    if scaling and scaler.is_enabled():
        scaler.load_state_dict(scaling)
    model_state, optimizer_state = get_state_dict(model, optimizer)
    state = {"model": model_state, "optimizer": optimizer_state}
    try:
        dcp.load(state, checkpoint_id=folder)
    except (RuntimeError, ValueError, dcp.api.CheckpointException) as error:
        raise UsageError(f"{folder}: the checkpoint of another model ({str(error).splitlines()[0]})") from error
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    return progress
