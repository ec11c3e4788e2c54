"""--parallel fsdp: student and teacher spread over the ranks, both alike (FSDP2, common/shards/).

Each block is gathered for its own computation, in fp32 under autocast as without sharding: the losses are the same.
Checkpoints are those of a model that is not sharded: rank 0 writes whole tensors, any number of ranks can go on.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import nn
from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method

from common import shards
from common.distributed import World
from data2vec.model.transformer_block import blocks_of
from data2vec.training.optimizer import FairseqAdam
from data2vec.training.update import TrainState


def shard(state: TrainState, world: World) -> None:
    """Spreads model (which may be on the host), teacher and optimizer, with what was loaded into them, over all ranks.

    A teacher that is not there yet is made now: a copy of the student, as it would be in the first update.

    Raises:
        UsageError: there is no process group to shard over.
    """
    model, loaded = state.model, state.optimizer.state_dict()
    teacher = model.teacher_holder.teacher or model.teacher_holder.make_teacher()
    shards.shard(model, blocks_of(model), world, "fp32")
    is_list = isinstance(teacher, nn.ModuleList)  # which is never called itself
    shards.shard(None if is_list else teacher, blocks_of(teacher), world, "fp32")
    if not is_list:  # what the teacher has beside its blocks is gathered for as long as targets are made
        teacher.make_targets = model.make_targets
        register_fsdp_forward_method(teacher, "make_targets")
        model.make_targets = teacher.make_targets
    _let_go(teacher)
    parameters = [p for p in model.parameters() if p.requires_grad]
    names = ("lr", "betas", "eps", "weight_decay", "fused")
    state.optimizer = FairseqAdam(parameters, **{name: state.optimizer.defaults[name] for name in names})
    shards.load_whole_optimizer(state.optimizer, loaded)
    state.step.optimizer, state.step.parameters = state.optimizer, parameters
    state.is_sharded = True


def _let_go(teacher: nn.Module) -> None:
    """FSDP2 keeps what is called first for a backward pass, which the teacher has not: the average is of shards."""
    for part in teacher.modules():
        if isinstance(part, FSDPModule):
            part.set_reshard_after_forward(True, recurse=False)


@contextlib.contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """`shards.gathered` for student and teacher."""
    teacher = model.teacher_holder.teacher
    with shards.gathered(model, teacher):
        yield
    _let_go(teacher)


def whole(content: dict[str, Any], world: World) -> dict[str, Any]:
    """A checkpoint's content with whole tensors, on rank 0. All ranks call it."""
    return shards.whole_tensors(content, keep=world.is_main)
