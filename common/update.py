"""One guarded optimizer step, the same for every project and device.

    scaled = step.scaled(loss); scaled.backward()          # fp16: times the loss scale
    done = step(number, loss)                              # unscale, norm, clip, skip or update, weight average
    step.check()                                           # at log lines, before every checkpoint and evaluation

Nothing is asked of the optimizer's kernel: torch_npu's fused AdamW ignores `grad_scale` and `found_inf` (op-plugin,
FusedAdamWKernelNpuOpApi.cpp), so gradients are unscaled, normalised and clipped as tensors, and whether a step is
skipped is decided on the host, or not at all:

- fp16: the host reads the gradient's norm, one wait a step. A step that overflowed leaves weights, moments and average
  as they are and halves the scale.
- fp32 and bf16 on a CPU: the same read costs nothing. A step that is not finite is not applied and ends the run.
- fp32 and bf16 on an accelerator: no wait. The first step that was not finite is remembered on the device; `check`
  ends the run before a checkpoint or an evaluation sees what it did.
"""

from __future__ import annotations

import contextlib
import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from common import distributed, npu
from common.device import require_precision, saturates
from common.errors import UsageError

MAX_SKIPPED = 50  # fp16 steps without an update in a row: the scale will not find its way any more
_REMEMBERED = 2048  # steps whose samples are known, for the message of a `check` that comes later


class NonFiniteStep(FloatingPointError):
    """A loss or gradient was inf or nan. `replay` says which step, ranks and samples, for `replay.json`."""

    def __init__(self, message: str, replay: dict[str, Any]):
        super().__init__(message)
        self.replay = replay


class Scale(Protocol):
    """fp16's loss scale: `update` learns whether a step's gradient was finite; `scale` is 1 where it is not enabled."""

    enabled: bool
    scale: float

    def update(self, finite: bool) -> None: ...


@dataclass
class LossScale:
    """A loss scale on the host, with `torch.amp.GradScaler`'s rules and the names of its state.

    Args:
        enabled: False without fp16: the scale is 1 and never changes.
        scale: to begin with; all there is where `dynamic` is False.
        dynamic: halved after a step that overflowed, doubled after `growth_interval` finite ones.
    """

    enabled: bool
    scale: float = 2.0**16
    dynamic: bool = True
    growth_interval: int = 2000
    finite_steps: int = 0

    def __post_init__(self) -> None:
        self.scale = float(self.scale) if self.enabled else 1.0

    def update(self, finite: bool) -> None:
        if not (self.enabled and self.dynamic):
            return
        self.finite_steps = self.finite_steps + 1 if finite else 0
        if not finite:
            self.scale /= 2
        elif self.finite_steps == self.growth_interval:
            self.scale, self.finite_steps = self.scale * 2, 0

    def state_dict(self) -> dict[str, Any]:
        if not self.enabled:
            return {}
        return {"scale": self.scale, "growth_interval": self.growth_interval, "_growth_tracker": self.finite_steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """A constant scale stays what the command says; one without a scale (of another precision) is passed over."""
        if self.enabled and self.dynamic and "scale" in state:
            self.scale = float(state["scale"])
            self.finite_steps = int(state.get("_growth_tracker", 0))


def loss_scale(device: torch.device, precision: str, setting: str | float = "dynamic") -> LossScale:
    """The loss scale of a run, enabled for fp16. `setting` is "dynamic" or a number for a constant scale.

    Raises:
        UsageError: a precision that this device lacks, or no usable number.
    """
    require_precision(device, precision)
    if setting == "dynamic":
        return LossScale(precision == "fp16")
    try:
        scale = float(setting)
    except ValueError:
        raise UsageError(f"loss scale {setting!r}: give 'dynamic' or a number") from None
    if not (scale > 0 and math.isfinite(scale)):
        raise UsageError(f"loss scale {setting}: must be a number above 0")
    return LossScale(precision == "fp16", scale, dynamic=False)


class Outcome(NamedTuple):
    """What a step came to."""

    norm: Tensor  # of the whole gradient, unscaled, before clipping; a scalar on the device
    applied: bool  # False: skipped, an fp16 overflow


class GuardedStep:
    """Applies accumulated gradients, which are averaged (or summed) over ranks, or shards of such.

    Args:
        optimizer: any of torch's kind; its rates are set by the caller.
        parameters: those it trains; gradients may be absent.
        scale: of the loss.
        clip_norm: largest norm of the whole gradient; None or 0 clips nothing.
        clip_eps: added to the norm that the clip divides by; torch has 1e-6, fairseq's fp16 path nothing.
        after: called when the weights have changed, e.g. to follow them with an average.
        remedy: advice that ends the message of a run that is stopped.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        parameters: Sequence[nn.Parameter],
        scale: Scale,
        *,
        clip_norm: float | None = None,
        clip_eps: float = 1e-6,
        after: Callable[[], None] | None = None,
        remedy: str = "Lower the learning rate, clip gradients, or use bf16 or fp32",
    ):
        self.optimizer, self.parameters, self.scale = optimizer, list(parameters), scale
        self.clip_norm, self.clip_eps, self.after, self.remedy = clip_norm, clip_eps, after, remedy
        self.skipped_in_a_row = 0
        self._first_bad: Tensor | None = None  # int64 [2]: first step with a bad loss of this rank, with a bad gradient
        self._samples: deque[tuple[int, Sequence[Any], dict[str, int]]] = deque(maxlen=_REMEMBERED)

    def scaled(self, loss: Tensor) -> Tensor:
        """What `backward` is called on."""
        return loss * self.scale.scale if self.scale.enabled else loss

    def remember(self, step: int, samples: Sequence[Any], **place: int) -> None:
        """Which samples this rank takes in a step, so that a stop can name them. Keeps references, copies nothing.

        Args:
            place: where in the data they are, for `replay.json`, if the step's number alone does not say it.
        """
        self._samples.append((step, samples, place))

    def samples_of(self, step: int) -> list[str]:
        """The remembered names."""
        return [str(name) for number, names, _ in self._samples if number == step for name in names]

    @torch.no_grad()
    def __call__(self, step: int, loss: Tensor, divisor: Tensor | float = 1.0) -> Outcome:
        """Applies the gradients and forgets them.

        Args:
            step: its number, counted from 1.
            loss: of this rank or of all, a scalar on the device.
            divisor: what gradients are divided by besides the loss scale, e.g. the number of samples they sum over.

        Raises:
            NonFiniteStep: on a CPU in fp32 or bf16, at once; in fp16 after `MAX_SKIPPED` skipped steps in a row. On all
                ranks alike.
        """
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        norm, factor = self._norm(gradients), 1.0
        if self.scale.scale != 1 or not (isinstance(divisor, float | int) and divisor == 1):
            factor = 1 / (divisor * self.scale.scale)
            norm = norm * factor
        self._note(step, loss, norm)
        applied = self._may_apply(step, norm)
        if applied:
            if self.clip_norm:
                factor = (self.clip_norm / (norm + self.clip_eps)).clamp(max=1.0) * factor
            if isinstance(factor, Tensor) or factor != 1:
                torch._foreach_mul_(_local(gradients), factor)
            self.optimizer.step()
            if self.after:
                self.after()
        self.optimizer.zero_grad(set_to_none=True)
        return Outcome(norm, applied)

    def check(self) -> None:
        """Ends all ranks when a step of any was not finite. Waits for the device; every rank calls it.

        Raises:
            NonFiniteStep: naming the first such step, its ranks and samples.
        """
        found = [0, 0] if self._first_bad is None else self._first_bad.tolist()
        if self.scale.enabled:
            found[1] = 0  # an infinite gradient is how the scale is found
        everyones = distributed.all_reduce_sum(torch.tensor([float(any(found))]))
        if float(everyones):
            self._stop(found)

    def _norm(self, gradients: list[Tensor]) -> Tensor:
        if not gradients:
            return torch.zeros(())
        norm = nn.utils.get_total_norm(gradients)
        return norm.full_tensor() if hasattr(norm, "full_tensor") else norm

    def _note(self, step: int, loss: Tensor, norm: Tensor) -> None:
        bad = torch.stack([~loss.detach().isfinite().all(), ~norm.isfinite()])  # [2]
        if self._first_bad is None:
            self._first_bad = torch.zeros(2, dtype=torch.int64, device=bad.device)
        self._first_bad = torch.where((self._first_bad == 0) & bad, step, self._first_bad)

    def _may_apply(self, step: int, norm: Tensor) -> bool:
        if not self.scale.enabled and norm.device.type != "cpu":
            return True
        finite = math.isfinite(float(norm)) and not self._cut_by_the_card(norm.device)
        if not self.scale.enabled:
            if not finite:
                assert self._first_bad is not None  # `_note` has seen this step
                self._stop(self._first_bad.tolist())
            return True
        self.scale.update(finite)
        self.skipped_in_a_row = 0 if finite else self.skipped_in_a_row + 1
        if self.skipped_in_a_row >= MAX_SKIPPED:
            raise NonFiniteStep(
                f"{MAX_SKIPPED} steps in a row without an update, the last is step {step}: fp16 gradients overflow at "
                f"every loss scale (now {self.scale.scale:g}); use bf16 or fp32. The last checkpoint is intact",
                self._replay(step, {}),
            )
        return finite

    def _cut_by_the_card(self, device: torch.device) -> bool:
        """Whether fp16 results of any rank were cut at the largest number, which a finite norm does not show."""
        if not (self.scale.enabled and saturates(device)):
            return False
        return bool(distributed.all_reduce_sum(torch.tensor([float(npu.take_overflow(device))])))

    def _stop(self, found: list[int]) -> None:
        """Raises on every rank with what all of them know."""
        here = min((step for step in found if step), default=0)
        step = min((step for step in distributed.gather_objects(here) if step), default=0)
        own_loss = found[0] == step
        seen = distributed.gather_objects((own_loss, self.samples_of(step)))
        culprits = [rank for rank, (bad_loss, _) in enumerate(seen) if bad_loss]
        what = "the loss" if culprits else "the gradient"
        where = f" on rank {', '.join(map(str, culprits))}" if culprits else ""
        named = [name for rank in culprits or range(len(seen)) for name in seen[rank][1]]
        shown = f" (samples {', '.join(named[:4])}{', ...' if len(named) > 4 else ''})" if named else ""
        applied = self._first_bad is not None and self._first_bad.device.type != "cpu" and not self.scale.enabled
        fate = "it was applied in memory, and nothing was saved after it" if applied else "it was not applied"
        ranks = {str(rank): names for rank, (_, names) in enumerate(seen) if rank in culprits or not culprits}
        raise NonFiniteStep(
            f"{what} became inf or nan at step {step}{where}{shown}; {fate}, the last checkpoint is intact. "
            f"{self.remedy}",
            self._replay(step, ranks),
        )

    def _replay(self, step: int, ranks: dict[str, list[str]]) -> dict[str, Any]:
        """What common/run/replay.py reads."""
        place = next((place for number, _, place in self._samples if number == step), {})
        return {"step": step, "ranks": ranks, "world_size": distributed.world_size(), "place": place}


@contextlib.contextmanager
def gradients_stay_local(model: nn.Module, local: bool) -> Iterator[None]:
    """Skips the gradient reduction of all but the last micro-batch, for DDP and FSDP2 alike."""
    if hasattr(model, "set_requires_gradient_sync"):
        model.set_requires_gradient_sync(not local)
        yield
    elif local and hasattr(model, "no_sync"):
        with model.no_sync():
            yield
    else:
        yield


def _local(gradients: list[Tensor]) -> list[Tensor]:
    """The shards that this rank holds of sharded gradients; others as they are."""
    return [g.to_local() if hasattr(g, "to_local") else g for g in gradients]
