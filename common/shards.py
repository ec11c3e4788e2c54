"""FSDP2: one model spread over the ranks, and its checkpoints, which load on any number of ranks or on none.

    python -m common.shards output/checkpoints/checkpoint-1200 model.pt     one plain file of a sharded checkpoint

A sharded checkpoint is a folder that `torch.distributed.checkpoint` (DCP) writes: a file a rank, an index, and
`progress.pt` with what is no tensor; `seal.json` has the digests of all of them. DCP unpickles its index and its plain
values without limits; here both go through an unpickler that knows tensors and plain values only.
"""

from __future__ import annotations

import argparse
import io
import os
import pickle
import shutil
import warnings
from collections.abc import Iterable, Sequence
from enum import Enum
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.planner import ReadItem
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from common import checkpoint_file, distributed
from common.checkpoint_file import CheckpointError
from common.distributed import World
from common.errors import UsageError

PROGRESS = "progress.pt"  # written last: a folder without it is not whole
_COMPUTE = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# what DCP's index consists of; anything else in it is refused
_INDEX_NAMES = {
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size", *(name for name, value in vars(torch).items() if isinstance(value, torch.dtype))},
    "pathlib": {"Path", "PosixPath"},
}


def shard(
    model: nn.Module, units: Iterable[nn.Module], world: World, precision: str, fp32: Sequence[Sequence[nn.Module]] = ()
) -> None:
    """FSDP2 (`fully_shard`): each of `units` is gathered for its own computation only, the rest of the model as a root.

    Masters and gradient sums stay in fp32, computation is in `precision`. The model may come from the host: a unit goes
    to the device as it is sharded, so that no card ever holds all of it.

    Args:
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
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=not fp32)
    for group in fp32:
        whole = MixedPrecisionPolicy(param_dtype=torch.float32, reduce_dtype=torch.float32, cast_forward_inputs=False)
        fully_shard(list(group), mesh=mesh, mp_policy=whole)
    for unit in units:
        fully_shard(unit, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)


def is_sharded(tensor: Any) -> bool:
    return isinstance(tensor, DTensor)


def whole_state(model: nn.Module) -> dict[str, Tensor]:
    """A sharded model's state dict with whole tensors, on the host of rank 0; empty elsewhere. All ranks call it."""
    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))


def save_shards(
    folder: Path,
    progress: Any,
    optimizer: torch.optim.Optimizer,
    model: nn.Module,
    **others: nn.Module,
) -> None:
    """Every rank writes its shards into a new folder, which then takes the name `folder`. All ranks call it.

    Args:
        progress: plain values and tensors, as `checkpoint_file.save` takes them.
        others: further models to keep, by name, e.g. a weight average.

    Raises:
        CheckpointError: on all ranks, where the ranks' hosts do not write into one and the same folder.
        OSError: naming the path, e.g. where the disk is full.
    """
    writing = folder.with_name(f".{folder.name}.writing")
    rank = distributed.rank()
    if rank == 0:
        shutil.rmtree(writing, ignore_errors=True)
    distributed.barrier()
    try:
        dcp.save(_parts(optimizer, model, others), checkpoint_id=writing)
    except dcp.api.CheckpointException as error:
        causes = [cause for cause, _ in error.failures.values() if isinstance(cause, OSError)]
        raise OSError(causes[0].errno, causes[0].strerror, str(folder)) if causes else error from error
    if rank == 0:
        checkpoint_file.save(progress, writing / PROGRESS)
    own = sorted(path.name for path in writing.glob(f"__{rank}_*"))
    digests: dict[str, list] = {}
    for part in distributed.gather_objects(checkpoint_file.digests_of(writing, own)):
        digests |= part
    missing = sorted(name for name in digests if not (writing / name).is_file())
    if any(distributed.gather_objects(bool(missing) and rank == 0)):
        raise CheckpointError(
            f"{folder}: shards are missing in it: the hosts do not share this folder, which --parallel fsdp needs"
        )
    if rank == 0:
        digests |= checkpoint_file.digests_of(writing, [PROGRESS, ".metadata"])
        checkpoint_file.seal(writing, files=digests)
        _put_in_place(writing, folder)
    distributed.barrier()


def _put_in_place(writing: Path, folder: Path) -> None:
    """A folder cannot be replaced at once: `saved_at` finds the old one where a crash comes between the renames."""
    old = folder.with_name(f".{folder.name}.old")
    if folder.exists():
        shutil.rmtree(old, ignore_errors=True)
        os.replace(folder, old)
    os.replace(writing, folder)
    checkpoint_file.sync(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def damage(folder: Path) -> str | None:
    """What is wrong with a sharded checkpoint, None where it is whole; one of an earlier version has no digests."""
    missing = [name for name in (PROGRESS, ".metadata") if not (folder / name).is_file()]
    if missing:
        return f"not a whole sharded checkpoint (it has no {missing[0]})"
    return checkpoint_file.damage(folder) if (folder / checkpoint_file.SEAL).exists() else None


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
        dcp.load(parts, storage_reader=_reader(folder), planner=_Planner())
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
    reader = _reader(folder)
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
            dcp.load(flat, storage_reader=reader, planner=_Planner(), no_dist=True)
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


def _enum_member(kind: Any, name: str) -> Enum:
    """What `builtins.getattr` may do in an index: the first Pythons 3.11 pickle an enum's member by it."""
    if isinstance(kind, type) and issubclass(kind, Enum) and name in kind.__members__:
        return kind[name]
    raise pickle.UnpicklingError(f"its index wants {name!r} of {kind!r}")


class _IndexUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("builtins", "getattr"):
            return _enum_member
        if name in _INDEX_NAMES.get(module, ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"its index wants to run {module}.{name}")


class _Reader(dcp.FileSystemReader):
    """DCP's reader with a safe unpickler for the index."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        with self.fs.create_stream(self._get_metadata_path(kwargs.get("rank")), "rb") as file:
            metadata = _IndexUnpickler(file).load()
        if getattr(metadata, "storage_meta", None) is None:
            metadata.storage_meta = StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


def _reader(folder: str | Path) -> _Reader:
    """The reader of a folder whose index is found good; DCP itself would go on without one."""
    reader = _Reader(folder)
    try:
        reader.read_metadata()
    except (OSError, EOFError, AttributeError, pickle.UnpicklingError) as error:
        raise CheckpointError(f"{folder}: not a readable sharded checkpoint ({error})") from error
    return reader


class _Planner(dcp.DefaultLoadPlanner):
    """DCP's planner for plain values only."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        # checked first, since DCP's own method then loads the same bytes without limits
        torch.load(value, weights_only=True)
        value.seek(0)
        super().load_bytes(read_item, value)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="sharding", description="Makes one plain file of a sharded checkpoint.")
    parser.add_argument("folder", type=Path, help="the checkpoint, e.g. output/checkpoints/checkpoint-1200")
    parser.add_argument("file", type=Path, help="torch file with the weights under 'model' (and 'ema'), by name")
    options = parser.parse_args(argv)
    if options.file.exists():
        parser.error(f"{options.file} exists: name a new file")
    try:
        parts = read_shards(options.folder)
    except CheckpointError as error:
        parser.error(str(error))
    weights = {name: part for name, part in parts.items() if name != "optimizer"}
    checkpoint_file.save(weights, options.file)
    print(f"{options.file}: {len(parts['model'])} tensors of {options.folder}; the optimizer's state stays there")


if __name__ == "__main__":
    main()
