"""`--replay FILE`: the batch of a step that was not finite once more, alone, on the weights of a checkpoint.

    recorded = replay.read("output/replay.json")            # written where a run stops (RunLog)
    ...                                                     # the run at its checkpoint, its data at recorded.step
    with RunLog(output_dir, world, f"{NETWORK}_replay", batch_size, evaluation=True) as log:
        return replay.run(recorded, log, model, guarded, attempt)

Nothing is updated, saved or moved: the answer is a sentence in the log and in a result file of its own.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from common import distributed
from common.errors import UsageError
from common.run_log import RunLog
from common.update import GuardedStep


@dataclass(frozen=True)
class Recorded:
    """What `replay.json` says.

    Attributes:
        step: that was not finite, counted from 1.
        ranks: names of the samples by rank; only of those whose loss was not finite, where these are known.
        world_size: ranks of that run.
        place: where in the data the step was, for loops that do not know it by the step's number.
    """

    path: Path
    step: int
    ranks: dict[str, list[str]]
    world_size: int
    place: dict[str, int]


@dataclass
class _Seen:
    """The first modules whose output, and the gradient of whose output, was not finite."""

    output: str | None = None
    gradient: str | None = None
    handles: list = field(default_factory=list)


def read(path: str | Path, total_steps: int, place: Sequence[str] = ()) -> Recorded:
    """A run's replay.json, with the names in `place`.

    Raises:
        UsageError: it cannot be read, is no such file, or is of a run on another number of ranks, or of a longer one.
    """
    path = Path(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        found = Recorded(path, content["step"], content["ranks"], content["world_size"], content["place"])
        numbers = [found.step, found.world_size, *(found.place[name] for name in place)]
        names = [name for names in found.ranks.values() for name in names]
        if not all(type(n) is int and 0 <= n < 2**31 for n in numbers) or found.step < 1 or found.world_size < 1:
            raise ValueError("a number in it is none, or out of range")
        if not all(type(name) is str for name in names):
            raise ValueError("a sample's name is no text")
    except OSError as error:
        raise UsageError(f"--replay {path}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UsageError(f"--replay {path}: not the replay.json of a run that stopped ({error})") from None
    if found.world_size != distributed.world_size():
        raise UsageError(
            f"--replay {path}: of a run on {found.world_size} ranks, this one has {distributed.world_size()}: its "
            "batches are only the same on as many"
        )
    if found.step > total_steps:
        raise UsageError(
            f"--replay {path}: of step {found.step}, this run ends after {total_steps}: give the data, epochs and "
            "batch size of the run that stopped"
        )
    return found


def run(
    recorded: Recorded, log: RunLog, model: nn.Module, guarded: GuardedStep, attempt: Callable[[], Tensor]
) -> dict[str, Any]:
    """Forward and backward of the recorded step, without an update. All ranks call it.

    Args:
        model: the plain module, for names.
        guarded: knows the samples (`remember`), the parameters and the loss scale.
        attempt: the step up to its gradients; returns this rank's loss, a scalar.

    Returns:
        What the result file says; `Replay` in it is the finding.

    Raises:
        UsageError: on all ranks: the samples are not those of the file, e.g. the data are others.
    """
    with _watching(model) as seen:
        loss = float(attempt().detach())
    _check_samples(recorded, guarded.samples_of(recorded.step))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    parameters = [
        names.get(id(p), "?") for p in guarded.parameters if p.grad is not None and not bool(p.grad.isfinite().all())
    ]
    ranks = distributed.gather_objects((loss, seen.output, seen.gradient, parameters))
    finding = _words(ranks)
    scale = f" at loss scale {guarded.scale.scale:g}" if guarded.scale.enabled else ""
    log.info(f"replay of step {recorded.step}{scale}: {finding}")
    return log.finish(Replay=finding)


def _check_samples(recorded: Recorded, own: list[str]) -> None:
    wanted = recorded.ranks.get(str(distributed.rank()))
    others = distributed.gather_objects(wanted is not None and wanted != own)
    if any(others):
        raise UsageError(
            f"--replay {recorded.path}: step {recorded.step} has other samples here: give the data, the seed and the "
            "batch size of the run that stopped"
        )


def _words(ranks: list[tuple[float, str | None, str | None, list[str]]]) -> str:
    """The finding over all ranks, a tuple each: loss, module, module, parameters."""
    losses = ", ".join(f"{loss:g}" for loss, *_ in ranks)
    if not any(not torch.tensor(loss).isfinite() or parameters for loss, _, _, parameters in ranks):
        return f"finite, the loss is {losses} and every gradient a number"
    parts = [f"not finite again, the loss is {losses}"]
    for what, index in (("output", 1), ("gradient of an output", 2)):
        where = {f"{found[index]} on rank {rank}" for rank, found in enumerate(ranks) if found[index]}
        if where:
            parts.append(f"first {what} that is not finite: {', '.join(sorted(where))}")
    parameters = max((found[3] for found in ranks), key=len)
    if parameters:
        parts.append(f"{len(parameters)} parameters with a gradient that is not finite, the first {parameters[0]}")
    return "; ".join(parts)


@contextlib.contextmanager
def _watching(model: nn.Module) -> Iterator[_Seen]:
    """Hooks on every module: an inner one is done before the one around it, so the first to be found is the place."""
    seen = _Seen()

    def look(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            for tensor in _tensors(output):
                if seen.output is None and not bool(tensor.detach().isfinite().all()):
                    seen.output = name
                if tensor.requires_grad:
                    tensor.register_hook(note)

        def note(gradient: Tensor) -> None:
            if seen.gradient is None and not bool(gradient.isfinite().all()):
                seen.gradient = name

        return hook

    for name, module in model.named_modules():
        seen.handles.append(module.register_forward_hook(look(name or type(model).__name__)))
    try:
        with torch.compiler.set_stance("force_eager"):  # hooks see nothing inside a compiled graph
            yield seen
    finally:
        for handle in seen.handles:
            handle.remove()


def _tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        if output.is_floating_point():
            yield output
    elif isinstance(output, dict):
        for value in output.values():
            yield from _tensors(value)
    elif isinstance(output, list | tuple):
        for value in output:
            yield from _tensors(value)
