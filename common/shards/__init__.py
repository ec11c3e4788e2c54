"""FSDP2: one model spread over the ranks, and its checkpoints, which load on any number of ranks or on none.

    python -m common.shards output/checkpoints/checkpoint-1200 model.pt     one plain file of a sharded checkpoint

A sharded checkpoint is a folder that `torch.distributed.checkpoint` (DCP) writes: a file a rank, an index, and
`progress.pt` with what is no tensor; `seal.json` has the digests of all of them. DCP unpickles its index and its plain
values without limits; here both go through an unpickler that knows tensors and plain values only (safe_reader.py).
"""

from __future__ import annotations

import contextlib
import os
import shutil
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from common import checkpoint_file, distributed
from common.checkpoint import digests
from common.checkpoint.background_write import BackgroundWriter
from common.checkpoint_file import CheckpointError
from common.distributed import World
from common.errors import UsageError
from common.shards import safe_reader

PROGRESS = "progress.pt"  # written last: a folder without it is not whole
_COMPUTE = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# one copy in the host's memory, written over by the next: a writer has one thing to write at a time
_stager = DefaultStager(StagingOptions(False, False, False, False))


def shard(
    model: nn.Module | None,
    units: Iterable[nn.Module],
    world: World,
    precision: str,
    fp32: Sequence[Sequence[nn.Module]] = (),
) -> None:
    """FSDP2 (`fully_shard`): each of `units` is gathered for its own computation only, the rest of the model as a root.

    Masters and gradient sums stay in fp32, computation is in `precision`. The model may come from the host: a unit goes
    to the device as it is sharded, so that no card ever holds all of it.

    Args:
        model: None where the units are all there is.
        fp32: groups of modules that are gathered and compute in fp32, such as a block's norms: near 1 bf16 knows no
            step smaller than 0.008. With any, what goes into a unit keeps its precision, too, under autocast: so does
            a residual stream in fp32.

    Raises:
        UsageError: there is no process group to shard over.
    """
    if not distributed.is_distributed():
        raise UsageError("--parallel fsdp shards over ranks: start with torchrun, e.g. --nproc_per_node 8")
    mesh = init_device_mesh(world.device.type, (world.size,))
    dtype = _COMPUTE[precision]
    casts = not fp32 and precision != "fp32"  # weights in fp32 may be used under autocast, which knows what to cast
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=casts)
    for group in fp32:
        whole = MixedPrecisionPolicy(param_dtype=torch.float32, reduce_dtype=torch.float32, cast_forward_inputs=False)
        fully_shard(list(group), mesh=mesh, mp_policy=whole)
    for unit in units:
        fully_shard(unit, mesh=mesh, mp_policy=policy)
    # a result that is a view (CLIP's features): nothing here changes one in place
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor", UserWarning)
    if model is not None:
        fully_shard(model, mesh=mesh, mp_policy=policy)


def is_sharded(tensor: Any) -> bool:
    return isinstance(tensor, DTensor)


def whole_tensors(value: Any, keep: bool) -> Any:
    """Nested dicts and lists with whole tensors in place of sharded ones, on the host; all ranks call it.

    Args:
        keep: whether this rank wants them; else they have no tensor in the end, only places of None.
    """
    if isinstance(value, dict):
        return type(value)((name, whole_tensors(part, keep)) for name, part in value.items())
    if isinstance(value, list):
        return [whole_tensors(part, keep) for part in value]
    if not isinstance(value, Tensor):
        return value
    whole = value.full_tensor() if is_sharded(value) else value
    return whole.cpu() if keep else None


@contextlib.contextmanager
def gathered(*models: nn.Module) -> Iterator[None]:
    """Every rank has the whole models meanwhile, for an evaluation in which ranks have other numbers of batches."""
    parts = [part for model in models for part in model.modules() if isinstance(part, FSDPModule)]
    for part in parts:
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()
    try:
        yield
    finally:
        for part in parts:
            part.reshard()
            part.set_reshard_after_forward(part not in models, recurse=False)


def whole_state(model: nn.Module) -> dict[str, Tensor]:
    """A sharded model's state dict with whole tensors, on the host of rank 0; empty elsewhere. All ranks call it."""
    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))


def save_shards(
    folder: Path,
    progress: Any,
    optimizer: torch.optim.Optimizer,
    model: nn.Module,
    writer: BackgroundWriter,
    then: Callable[[], None] = lambda: None,
    **others: nn.Module,
) -> None:
    """Has every rank write its shards into a new folder, which then takes the name `folder`. All ranks call it.

    It returns when the shards are copied: the rest is what `dcp.async_save` does, in the writer's thread.

    Args:
        progress: plain values and tensors, as `checkpoint_file.save` takes them.
        then: called on rank 0 when the folder has its name.
        others: further models to keep, by name, e.g. a weight average.

    Raises, from the writer's next call on all ranks:
        CheckpointError: the ranks' hosts do not write into one and the same folder.
        OSError: naming the path, e.g. where the disk is full.
    """
    writer.wait()  # its copy is written over
    group = distributed.background_group()
    parts = _parts(optimizer, model, others)
    kept = parts if writer.at_once else _stager.stage(parts)
    writer.submit(progress, lambda progress: _write_shards(folder, kept, progress, group, then))


def _write_shards(
    folder: Path, parts: dict[str, Any], progress: Any, group: ProcessGroup | None, then: Callable[[], None]
) -> None:
    writing, rank = folder.with_name(f".{folder.name}.writing"), distributed.rank()
    _on_all(group, lambda: shutil.rmtree(writing, ignore_errors=True) if rank == 0 else None)
    try:
        # no copying ahead: in this new thread it would wait for card 0, and each rank would take memory there
        dcp.save(parts, storage_writer=dcp.FileSystemWriter(writing, per_thread_copy_ahead=0), process_group=group)
    except dcp.api.CheckpointException as error:
        causes = [cause for cause, _ in error.failures.values() if isinstance(cause, OSError)]
        raise OSError(causes[0].errno, causes[0].strerror, str(folder)) if causes else error from error

    def look() -> dict[str, list]:
        if rank == 0:
            checkpoint_file.save(progress, writing / PROGRESS)
        return digests.digests_of(writing, sorted(path.name for path in writing.glob(f"__{rank}_*")))

    found = {name: digest for part in _on_all(group, look) for name, digest in part.items()}
    if any(_on_all(group, lambda: rank == 0 and not all((writing / name).is_file() for name in found))):
        raise CheckpointError(
            f"{folder}: shards are missing in it: the hosts do not share this folder, which --parallel fsdp needs"
        )

    def finish() -> None:
        digests.seal(writing, files=found | digests.digests_of(writing, [PROGRESS, ".metadata"]))
        _put_in_place(writing, folder)
        then()

    _on_all(group, lambda: finish() if rank == 0 else None)


def _on_all(group: ProcessGroup | None, part: Callable[[], Any]) -> list[Any]:
    """What `part` returns on each rank, in rank order; an OSError of any rank is raised on all."""
    result, failed = None, None
    try:
        result = part()
    except OSError as error:
        failed = (error.errno, error.strerror, error.filename) if error.errno else (str(error),)
    found = distributed.gather_objects((result, failed), group)
    for _, failed in found:
        if failed:
            raise OSError(*failed)
    return [result for result, _ in found]


def _put_in_place(writing: Path, folder: Path) -> None:
    """A folder cannot be replaced at once: `saved_at` finds the old one where a crash comes between the renames."""
    old = folder.with_name(f".{folder.name}.old")
    if folder.exists():
        shutil.rmtree(old, ignore_errors=True)
        os.replace(folder, old)
    os.replace(writing, folder)
    digests.sync(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def damage(folder: Path) -> str | None:
    """What is wrong with a sharded checkpoint, None where it is whole; one of an earlier version has no digests."""
    missing = [name for name in (PROGRESS, ".metadata") if not (folder / name).is_file()]
    if missing:
        return f"not a whole sharded checkpoint (it has no {missing[0]})"
    return digests.damage(folder) if (folder / digests.SEAL).exists() else None


def load_progress(folder: Path) -> Any:
    """What `save_shards` was given as progress; CheckpointError where the folder is not whole."""
    if problem := damage(folder):
        raise CheckpointError(f"{folder}: {problem}")
    return checkpoint_file.load(folder / PROGRESS)


def load_shards(folder: Path, optimizer: torch.optim.Optimizer, model: nn.Module, **others: nn.Module) -> None:
    """Restores `save_shards`' folder in place, on any number of ranks, sharded or not. All ranks call it.

    Raises:
        CheckpointError: the checkpoint of another model, damaged, or with foreign code in it.
    """
    parts = _parts(optimizer, model, others)
    try:
        dcp.load(parts, storage_reader=safe_reader.reader(folder), planner=safe_reader.Planner())
    except (RuntimeError, ValueError, OSError, dcp.api.CheckpointException) as error:
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(f"{folder}: the checkpoint of another model, or damaged ({reason})") from error
    set_state_dict(model, optimizer, model_state_dict=parts["model"], optim_state_dict=parts["optimizer"])
    for name, other in others.items():
        set_model_state_dict(other, parts[name])


def read_shards(folder: str | Path) -> dict[str, Any]:
    """The models of a sharded checkpoint with whole tensors, read by this process alone: {"model": {...}, ...}.

    Raises:
        CheckpointError: no such folder, damaged, or with foreign code in it.
    """
    folder = Path(folder)
    if problem := damage(folder):
        raise CheckpointError(f"{folder}: {problem}")
    reader = safe_reader.reader(folder)
    metadata = reader.read_metadata()
    entries = {
        name: entry
        for name, entry in metadata.state_dict_metadata.items()
        if metadata.planner_data[name][0] != "optimizer" and isinstance(entry, TensorStorageMetadata)
    }
    wanted = sum(entry.size.numel() * entry.properties.dtype.itemsize for entry in entries.values())
    if wanted > sum(path.stat().st_size for path in folder.iterdir()):  # nothing is allocated on an index's word alone
        raise CheckpointError(f"{folder}: not a readable sharded checkpoint (its index names more than its files hold)")
    flat = {name: torch.empty(entry.size, dtype=entry.properties.dtype) for name, entry in entries.items()}
    try:
        with warnings.catch_warnings():  # that it is done by one process, which is meant
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            dcp.load(flat, storage_reader=reader, planner=safe_reader.Planner(), no_dist=True)
    except (RuntimeError, ValueError, OSError, dcp.api.CheckpointException) as error:
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(f"{folder}: not a readable sharded checkpoint ({reason})") from error
    parts: dict[str, Any] = {}
    for name, tensor in flat.items():
        part, *path = metadata.planner_data[name]
        parts.setdefault(part, {})[".".join(path)] = tensor
    return parts


def saved_at(folder: Path) -> Path | None:
    """`folder` if it is a whole sharded checkpoint; else the one before it, where a crash came between two renames."""
    for path in (folder, folder.with_name(f".{folder.name}.old")):
        if path.exists():
            if (problem := damage(path)) is None:
                return path
            warnings.warn(f"{path}: {problem}; it is passed over", stacklevel=2)
    return None


def newest_shards(folder: str | Path, pattern: str = "checkpoint-*") -> Path | None:
    """The sharded checkpoint with the highest number in its name that is whole, or None."""
    found = [path for path in Path(folder).glob(pattern) if path.is_dir()]
    for path in sorted(found, key=checkpoint_file.number, reverse=True):
        if (problem := damage(path)) is None:
            return path
        warnings.warn(f"{path}: {problem}; an older checkpoint is looked for", stacklevel=2)
    return None


def keep_newest_shards(folder: Path, count: int, pattern: str = "checkpoint-*") -> None:
    """Deletes all but the `count` newest whole sharded checkpoints of a folder; 0 keeps all."""
    found = [path for path in folder.glob(pattern) if path.is_dir() and damage(path) is None]
    for path in sorted(found, key=checkpoint_file.number)[:-count] if count > 0 else []:
        checkpoint_file.remove(path)


def load_whole_model(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Loads an unsharded state dict, which every rank has read, into a sharded model. All ranks call it."""
    set_model_state_dict(model, state, options=StateDictOptions(full_state_dict=True))


def load_whole_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Loads an unsharded `optimizer.state_dict()` into an optimizer of sharded parameters. All ranks call it."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]

    def place(parameter: Tensor, value: Any) -> Any:
        if not (is_sharded(parameter) and isinstance(value, Tensor) and value.shape == parameter.shape):
            return value
        return distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements)

    spread = {
        index: {name: place(parameters[index], value) for name, value in entry.items()}
        for index, entry in state["state"].items()
    }
    optimizer.load_state_dict({**state, "state": spread})


def _parts(optimizer: torch.optim.Optimizer, model: nn.Module, others: dict[str, nn.Module]) -> dict[str, Any]:
    model_state, optimizer_state = get_state_dict(model, optimizer)
    rest = {name: get_model_state_dict(other) for name, other in others.items()}
    return {"model": model_state, "optimizer": optimizer_state, **rest}
