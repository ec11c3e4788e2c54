"""The process group: up from torchrun's variables, down on every path, and the few collectives the projects need.

Everything here also works in a single process without a group, so no caller asks whether it is distributed.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import os
import time
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.nn.functional  # noqa: F401  # else DDP imports it later, and its defaults hold the group for ever

from common import device as devices
from common import npu
from common.cpu import keep_freed_memory
from common.network import lost_ranks, torchrun

# Backend by device. The pair for npu lets CPU tensors (counters, objects, checkpoints' metadata) use gloo beside hccl.
_BACKEND = {"cpu": "gloo", "cuda": "cpu:gloo,cuda:nccl", "npu": "cpu:gloo,npu:hccl"}

# Groups that have been torn down, kept until Python exits. A DDP module that outlives the `with` block would otherwise
# own the last reference, and gloo's destructor, called with Python's lock held, can wait for ever.
_ended_groups: list[dist.ProcessGroup] = []
_stores: list[dist.Store] = []  # of the process, then a part of it for each group
_watches: list[lost_ranks.Watch] = []  # of the group that is up
_meetings: list[str] = []  # of `wait_for_all`, in the group that is up
LOOK_S = 600.0  # between two looks whether all ranks are still there
_timeouts: list[timedelta] = []  # of a collective of training, in the group that is up
_background: list[dist.ProcessGroup] = []  # of the group that is up, see `background_group`
_failed_groups: list[dist.ProcessGroup] = []  # a thread of these may wait for a rank that is gone: never joined


@dataclass(frozen=True)
class World:
    """This process's place among all processes of the run."""

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and prints."""
        return self.rank == 0


@contextlib.contextmanager
def process_group(device_name: str = "auto", init_timeout_s: int = 1800, train_timeout_s: int = 600) -> Iterator[World]:
    """Resolves the device and, under torchrun, brings the process group up; takes it down on every path.

    The first meeting may take long (hosts start at different times, caches fill); after it each collective must be done
    within `train_timeout_s` (or the user's COLLECTIVE_TIMEOUT_S), so that a lost host ends the job in minutes and not
    in half an hour.

    Raises:
        devices.UsageError: absent device, or torchrun's variables missing or contradictory.
        RanksLost: in place of torch's error, when a collective failed; it says which ranks and hosts are gone.
    """
    world = _this_process(device_name)
    device, rank = world.device, world.rank
    train_timeout_s = torchrun.timeout_of_user() or train_timeout_s
    if "RANK" not in os.environ:
        yield world
        return

    backend = _BACKEND[device.type]
    if device.type == "npu":
        init_timeout_s, train_timeout_s = npu.group_timeouts(init_timeout_s, train_timeout_s)
    if world.is_main:
        timeouts = f"{init_timeout_s} s to meet, {train_timeout_s} s a collective"
        print(f"process group: {world.size} ranks, {backend}, time-outs: {timeouts}", flush=True)
    timeout = timedelta(seconds=init_timeout_s)
    dist.init_process_group(
        backend,
        store=_meeting_place(timeout),
        rank=rank,
        world_size=world.size,
        timeout=timeout,
        device_id=device if device.type == "cuda" else None,
    )
    group, kept_in = dist.group.WORLD, _failed_groups
    watch = None
    try:
        barrier()
        watch = _watch_ranks(rank)
        _watches.append(watch)
        _meetings.clear()
        _timeouts[:] = [timedelta(seconds=train_timeout_s)]
        _set_timeout(_timeouts[-1])
        yield world
        kept_in = _ended_groups
    except RuntimeError as error:
        if watch and lost_ranks.is_of_a_collective(error) and (who := lost_ranks.describe(watch)):
            raise lost_ranks.RanksLost(f"rank {rank} could not go on with the other ranks: {who}") from error
        raise
    finally:
        kept_in += [group, *_background]
        _background.clear()
        if watch:
            _watches.remove(watch)
            watch.close()
        # After an error the other ranks may never answer: destroy does not wait for them, and torchrun ends them all.
        with contextlib.suppress(RuntimeError, ValueError):
            dist.destroy_process_group()


def _this_process(device_name: str) -> World:
    """Its place by torchrun's variables, with its device resolved and set up."""
    rank, size, local_rank, local_size = torchrun.ranks()
    device = devices.resolve(device_name, local_rank)
    if os.environ.get("DETERMINISTIC") == "1":  # --deterministic of test/*.sh
        devices.deterministic(device)
    if device.type == "cpu":
        keep_freed_memory()
    return World(device, rank, size, local_rank, local_size)


def _meeting_place(timeout: timedelta) -> dist.Store:
    """Where the ranks find each other, new for every group of this process.

    The store is one for the process: a second of the same port could not be opened, and what an earlier group left in
    it, such as the addresses of its ranks, would mislead a later one.
    """
    if not _stores:
        _stores.append(next(iter(dist.rendezvous("env://", timeout=timeout)))[0])
    _stores.append(dist.PrefixStore(f"meeting_{len(_stores)}", _stores[0]))
    return _stores[-1]


@atexit.register
def _end_collective_threads() -> None:
    """Ends gloo's threads while Python still runs.

    Such a thread needs Python's lock to let go of a finished collective's tensors; one that asks for it after the
    interpreter has begun to shut down aborts the process, and with it a run that was done.
    """
    gc.collect()  # a DDP module is a cycle of references and holds its group until it is collected
    remaining = [weakref.ref(group) for group in _ended_groups + _failed_groups]
    _ended_groups.clear()  # the last reference: waits for the threads, without Python's lock
    if any(group() is not None for group in remaining):
        # held by FSDP2's caches, or failed: its threads cannot be joined, so they get the time to let go
        time.sleep(0.2)


def _watch_ranks(rank: int) -> lost_ranks.Watch:
    watch, place = lost_ranks.open_door(rank)
    places = gather_objects(place)
    watch.places = places if None not in places else ()
    return watch


def _set_timeout(timeout: timedelta) -> None:
    """Sets the time-out of later collectives on every backend of the default group that lets it be changed.

    torch_npu's HCCL does not: there HCCL_EXEC_TIMEOUT is the limit, see `npu.group_timeouts`.
    """
    group = dist.group.WORLD
    for device in group._device_types:
        with contextlib.suppress(RuntimeError):  # gloo lists cuda as well, where there may be none
            backend = group._get_backend(device)
            if hasattr(backend, "_set_default_timeout"):
                backend._set_default_timeout(timeout)


def is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    return dist.get_rank() if is_distributed() else 0


def world_size() -> int:
    return dist.get_world_size() if is_distributed() else 1


def background_group() -> dist.ProcessGroup | None:
    """The group for what a thread of each rank does beside the training, whose collectives must not meet its own.

    All ranks call it, at the same place of the training. A rank waits for the others there as long as in a step.
    """
    if is_distributed() and not _background:
        _background.append(dist.new_group(backend="gloo", timeout=_timeouts[-1] if _timeouts else None))
    return _background[0] if _background else None


def barrier() -> None:
    """Waits for all ranks. An all-reduce of one number: unlike `dist.barrier` it need not guess a device."""
    if is_distributed():
        dist.all_reduce(torch.zeros(1))  # a CPU tensor: every backend string above has gloo for it


def wait_for_all() -> None:
    """Waits for all ranks however long one takes, in no collective, whose time-out is for steps and not for hours.

    Raises:
        RanksLost: one of them is gone.
    """
    if not is_distributed():
        return
    store, name, pause, looked = _stores[-1], f"met_{len(_meetings)}", 0.01, time.monotonic()
    _meetings.append(name)
    store.add(name, 1)
    while store.add(name, 0) < world_size():
        time.sleep(pause)
        pause = min(2 * pause, 1.0)
        if _watches and time.monotonic() - looked > LOOK_S:
            if lost := lost_ranks.gone(_watches[-1]):
                raise lost_ranks.RanksLost(f"rank {rank()} waits for the other ranks: {lost}")
            looked = time.monotonic()


def all_reduce_sum(tensor: torch.Tensor) -> torch.Tensor:
    """A new tensor, the sum over ranks; no gradient."""
    tensor = tensor.detach().clone()
    if is_distributed():
        dist.all_reduce(tensor)
    return tensor


def all_reduce_mean(tensor: torch.Tensor) -> torch.Tensor:
    """A new tensor, the mean over ranks; no gradient."""
    return all_reduce_sum(tensor) / world_size()


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor: torch.Tensor) -> torch.Tensor:
        ctx.rows = tensor.shape[0]
        parts = [torch.empty_like(tensor) for _ in range(world_size())]
        dist.all_gather(parts, tensor.contiguous())
        return torch.cat(parts)  # [world * rows, ...]

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> torch.Tensor:
        gradient = gradient.contiguous().clone()
        dist.all_reduce(gradient)
        start = rank() * ctx.rows
        return gradient[start : start + ctx.rows]


def all_gather_with_grad(tensor: torch.Tensor) -> torch.Tensor:
    """All ranks' tensors (equal shapes) concatenated on dim 0 in rank order, differentiable.

    The backward pass sums the gradient over ranks and returns this rank's rows: exact when the global objective is the
    *sum* of the ranks' losses. DDP averages parameter gradients, so with a per-rank *mean* loss over its local rows the
    result is the gradient of the mean over the global batch.
    """
    return _AllGather.apply(tensor) if is_distributed() else tensor


def broadcast_object(obj: Any, source: int = 0) -> Any:
    """`obj` of the source rank, on all ranks."""
    if not is_distributed():
        return obj
    box = [obj if rank() == source else None]
    dist.broadcast_object_list(box, src=source, device=torch.device("cpu"))
    return box[0]


def gather_objects(obj: Any, group: dist.ProcessGroup | None = None) -> list[Any]:
    """Every rank's `obj`, in rank order, on all ranks; `group` is `background_group()` in its threads."""
    if not is_distributed():
        return [obj]
    objects: list[Any] = [None] * world_size()
    dist.all_gather_object(objects, obj, group)
    return objects
