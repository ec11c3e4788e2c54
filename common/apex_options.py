"""The options of apex.amp that older command lines have, in torch's own mixed precision; and apex itself, where asked.

    --fp16_opt_level O0|O1|O2|O3   --loss_scale dynamic|NUMBER   --use_combine_grad   --amp_backend native|apex

| apex (Ascend/apex, NVIDIA/apex) | here |
|---|---|
| O0 | fp32 |
| O1 | fp16 autocast, loss scaling |
| O2 | the same. The parameters stay fp32, where apex has an fp16 model and an fp32 copy of it: not equal to the bit |
| O3 | the same; a model and an optimizer all in fp16 do not train |
| loss_scale dynamic | torch.amp.GradScaler |
| loss_scale NUMBER | a constant scale; steps with inf or nan gradients are skipped, the scale stays |
| combine_grad, check_combined_tensors | nothing: DDP's buckets and the fused optimizer do it |
| keep_batchnorm_fp32 | nothing: autocast keeps normalisation in fp32 |

`--amp_backend apex` uses apex.amp itself where it is installed, at level O1, in ViT and in BEiT v2. At O2 and O3 the
parameters become fp16, which clipping, weight averages and checkpoints here know nothing of. CLIP trains through
transformers' Trainer, which gave apex up, and data2vec scales its loss by fairseq's rules: both refuse the option.
"""

from __future__ import annotations

import importlib
import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from common.device import grad_scaler
from common.errors import UsageError

LEVELS = ("O0", "O1", "O2", "O3")
BACKENDS = ("native", "apex")


@dataclass(frozen=True)
class MixedPrecision:
    """What the options come to: a precision (None: the project's default) and notes for the user."""

    precision: str | None
    notes: tuple[str, ...]


def translate(
    level: str | None, precision: str | None, combine_grad: bool = False, backend: str | None = None
) -> MixedPrecision:
    """The precision that an apex level stands for; fp32 under apex itself, which casts without torch's autocast.

    Args:
        level: of --fp16_opt_level, None where it was not given.
        precision: of --precision, None likewise.
        combine_grad: whether --use_combine_grad was given.
        backend: of --amp_backend, None likewise.

    Raises:
        UsageError: no level of apex, one that contradicts the precision, or apex asked for where it cannot be used.
    """
    notes = []
    if backend == "apex":
        if level != "O1":
            given = "without --fp16_opt_level" if level is None else f"with --fp16_opt_level {level}"
            raise UsageError(f"--amp_backend apex {given}: give --fp16_opt_level O1; native does the other levels")
        _require_apex()
    if combine_grad:
        notes.append(
            "--use_combine_grad has no effect: DDP's buckets and the fused optimizer combine gradients already"
        )
    if level is None:
        return MixedPrecision(precision, tuple(notes))
    if level not in LEVELS:
        raise UsageError(f"--fp16_opt_level {level}: O0, O1, O2 or O3")
    meant = "fp32" if level == "O0" else "fp16"
    if precision not in (None, meant):
        raise UsageError(f"--fp16_opt_level {level} is {meant}, --precision is {precision}: give one of them")
    if backend == "apex":
        return MixedPrecision("fp32", (*notes, "apex.amp at O1 does the casts: torch's own precision is fp32"))
    if level in ("O2", "O3"):
        notes.append(f"--fp16_opt_level {level} is fp16 autocast, as O1: the parameters stay fp32")
    else:
        notes.append(f"--fp16_opt_level {level} is --precision {meant}")
    return MixedPrecision(meant, tuple(notes))


def find_apex() -> Path | None:
    """The folder of apex.amp where it is installed. Runs no code of it: PyPI's `apex` is an unrelated web toolkit."""
    spec = importlib.util.find_spec("apex")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        amp = Path(folder) / "amp"
        if (amp / "frontend.py").is_file() and "def initialize" in (amp / "frontend.py").read_text(errors="replace"):
            return amp
    return None


def _require_apex() -> None:
    if find_apex() is None:
        raise UsageError(
            "--amp_backend apex: no apex.amp is installed (PyPI's `apex` is an unrelated package); "
            "leave the option out for torch's own mixed precision"
        )


def gradient_scaler(
    backend: str,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    device: torch.device,
    precision: str,
    loss_scale: str | float = "dynamic",
) -> torch.amp.GradScaler | ApexScaler:
    """The loss scaling of a run: torch's, active for fp16, or apex with its casts.

    Args:
        backend: native or apex.
        model: bare, before it is wrapped for several ranks.
        optimizer: of its parameters.
        device, precision, loss_scale: as in `device.grad_scaler`.
    """
    if backend == "apex":
        return ApexScaler(model, optimizer, loss_scale)
    return grad_scaler(device, precision, loss_scale)


def restore_scale(scaler: torch.amp.GradScaler | ApexScaler, state: dict[str, Any]) -> None:
    """Gives a scaler the state that a checkpoint has; that of the other backend means nothing to it: it begins anew."""
    if isinstance(scaler, ApexScaler) == ("loss_scaler0" in state):
        scaler.load_state_dict(state)


class ApexScaler:
    """apex.amp at level O1, behind the methods of `torch.amp.GradScaler`.

    apex patches torch's functions, so the training loop runs without autocast. Written against apex's documentation and
    tested with a stand-in of its interface; not run with a real apex, which has no release for torch 2.13.

    Args:
        model: bare, before it is wrapped for several ranks.
        optimizer: of its parameters; apex replaces its `step`.
        loss_scale: "dynamic" or a number.

    Raises:
        UsageError: no apex.amp is installed, or the parameters are shards.
    """

    def __init__(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer, loss_scale: str | float = "dynamic"):
        from torch.distributed.tensor import DTensor  # a slow import, of which most runs have no need

        _require_apex()
        if any(isinstance(parameter, DTensor) for parameter in model.parameters()):
            raise UsageError("--amp_backend apex: knows no sharded parameters; give --parallel ddp")
        self._amp = importlib.import_module("apex.amp")
        scale = loss_scale if loss_scale == "dynamic" else float(loss_scale)
        self._amp.initialize(model, optimizer, opt_level="O1", loss_scale=scale, verbosity=0)
        self._optimizer = optimizer

    def scale(self, loss: torch.Tensor) -> _ScaledLoss:
        return _ScaledLoss(self._amp, loss, self._optimizer)

    def unscale_(self, optimizer: torch.optim.Optimizer) -> None:
        """Nothing: apex has unscaled at the end of the backward pass."""

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        optimizer.step()  # apex's, which skips a step that overflowed

    def update(self) -> None:
        """Nothing: apex has adapted the scale at the end of the backward pass."""

    def is_enabled(self) -> bool:
        return True

    def get_scale(self) -> float:
        return float(self._amp.state_dict()["loss_scaler0"]["loss_scale"])

    def state_dict(self) -> dict[str, Any]:
        return self._amp.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._amp.load_state_dict(state)


class _ScaledLoss:
    """A loss whose `backward` runs inside apex's context: it scales before and unscales the gradients after."""

    def __init__(self, amp: Any, loss: torch.Tensor, optimizer: torch.optim.Optimizer):
        self._amp, self._loss, self._optimizer = amp, loss, optimizer

    def backward(self) -> None:
        with self._amp.scale_loss(self._loss, self._optimizer) as scaled:
            scaled.backward()
