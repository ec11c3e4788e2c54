"""`--dump_precision`: what every module of the first training step put out and got back, as a few numbers each.

`<output_dir>/dump_precision/step<N>/rank<R>/dump.json` has, for each call of a module, the largest and smallest value,
mean and 2-norm of its inputs, of its results and of the gradients of its results; and those of the gradients of its
parameters as the optimizer meets them. The layout is that of Ascend's own tool, msprobe (mindstudio-probe; statistics
of level L0), which is not needed: it would be forty packages for what four hooks do.
`python -m common.profile.precision_compare RUN_A RUN_B` names the first module where two differ.
"""

from __future__ import annotations

import gc
import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as module_hooks
from torch.nn.parallel import DistributedDataParallel
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils._pytree import tree_leaves

from common.distributed import World

FOLDER = "dump_precision"
STATISTICS = ("Max", "Min", "Mean", "Norm")


class PrecisionDump:
    """Records in its `with` block up to `finish`, on every rank, where DUMP_PRECISION=1 asks for it.

    --dump_precision of test/*.sh sets that. The recorded step is slower, and equal to the bit: the numbers stay on the
    device until `finish` reads them at once.

    Args:
        of_training: of anything else nothing is recorded.
    """

    def __init__(self, output_dir: Path, world: World, of_training: bool = True):
        self._is_wanted = of_training and os.environ.get("DUMP_PRECISION") == "1"
        self._folder = Path(output_dir) / FOLDER
        self._world = world
        self._names: dict[int, str] = {}  # of modules, by id
        self._calls: dict[str, int] = {}
        self._entries: dict[str, dict[str, list[dict]]] = {}
        self._waiting: list[tuple[dict, Tensor]] = []  # an entry, and its four numbers on the device
        self._hooks: list[Any] = []

    def __enter__(self) -> PrecisionDump:
        if self._is_wanted:
            self._hooks = [
                module_hooks.register_module_forward_hook(self._after_forward, with_kwargs=True),
                register_optimizer_step_pre_hook(self._before_update),
            ]
        return self

    def __exit__(self, *_: Any) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def finish(self, step: int) -> str | None:
        """Writes what was recorded up to the end of this step; returns what to tell the user, once."""
        if not self._hooks:
            return None
        self.__exit__()
        if self._waiting:
            for (entry, _), numbers in zip(
                self._waiting, torch.stack([values for _, values in self._waiting]).tolist(), strict=True
            ):
                entry.update(zip(STATISTICS, numbers, strict=True))
        path = self._folder / f"step{step}" / f"rank{self._world.rank}" / "dump.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        head = {"task": "statistics", "level": "L0", "framework": "pytorch", "dump_data_dir": None}
        path.write_text(json.dumps(head | {"data": self._entries}, indent=1) + "\n", encoding="utf-8")
        return f"precision dump: {path}, {len(self._entries)} entries"

    # -- hooks -------------------------------------------------------------------------------------------------------

    def _after_forward(self, module: nn.Module, args: tuple, kwargs: dict, result: Any) -> None:
        name = self._name(module)
        if name is None or torch.compiler.is_compiling():
            return
        number = self._calls[name] = self._calls.get(name, -1) + 1
        tensors = _tensors(result)
        self._add(f"{name}.forward.{number}", "input_args", _tensors((args, kwargs)))
        self._add(f"{name}.forward.{number}", "output", tensors)
        for tensor in tensors:
            if tensor.requires_grad:
                tensor.register_hook(lambda grad: self._add(f"{name}.backward.{number}", "input", [grad]))

    def _before_update(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        trained = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        for module in _all_modules():
            for key, parameter in module.named_parameters(recurse=False):
                if id(parameter) in trained and parameter.grad is not None and (name := self._name(module)):
                    self._add(f"{name}.parameters_grad.0", key, [parameter.grad])

    def _add(self, entry: str, part: str, tensors: list[Tensor]) -> None:
        if not self._hooks:
            return  # a gradient after the end of the step
        found = self._entries.setdefault(entry, {}).setdefault(part, [])
        for tensor in tensors:
            found.append({"type": "torch.Tensor", "dtype": str(tensor.dtype), "shape": list(tensor.shape)})
            if tensor.numel():
                self._waiting.append((found[-1], _statistics(tensor)))

    def _name(self, module: nn.Module) -> str | None:
        """`Module.<class of the model>.<place in it>.<class>`; None for the wrapper of several ranks."""
        if isinstance(module, DistributedDataParallel):
            return None
        if id(module) not in self._names:
            for model in _models():
                self._names.setdefault(id(model), f"Module.{_class_of(model)}.{_class_of(model)}")
                for place, part in model.named_modules():
                    self._names.setdefault(id(part), f"Module.{_class_of(model)}.{place}.{_class_of(part)}")
        return self._names[id(module)]


def _all_modules() -> list[nn.Module]:
    return [each for each in gc.get_objects() if issubclass(type(each), nn.Module)]  # isinstance would ask a property


def _models() -> list[nn.Module]:
    """The modules that are in no other; what is in DistributedDataParallel counts as in none."""
    everything = _all_modules()
    inner = {id(child) for m in everything if not isinstance(m, DistributedDataParallel) for child in m.children()}
    return [m for m in everything if id(m) not in inner and not isinstance(m, DistributedDataParallel)]


def _class_of(module: nn.Module) -> str:
    return type(module).__name__.removeprefix("FSDP")


def _tensors(values: Any) -> list[Tensor]:
    """The tensors of numbers in a structure; of a sharded one this rank's part."""
    found = [getattr(leaf, "_local_tensor", leaf) for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]
    return [tensor for tensor in found if tensor.is_floating_point()]


def _statistics(tensor: Tensor) -> Tensor:
    """[4], fp32 on the device: STATISTICS."""
    with torch.no_grad():
        values = getattr(tensor, "_local_tensor", tensor).detach().float()
        return torch.stack((values.max(), values.min(), values.mean(), values.norm()))
