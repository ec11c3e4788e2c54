"""The options of apex.amp that older command lines have, in torch's own mixed precision.

    --fp16_opt_level O0|O1|O2|O3   --loss_scale dynamic|NUMBER   --use_combine_grad   --amp_backend native|apex

| apex (Ascend/apex, NVIDIA/apex) | here |
|---|---|
| O0 | fp32 |
| O1 | fp16 autocast, loss scaling |
| O2 | the same. The parameters stay fp32, where apex has an fp16 model and an fp32 copy of it: not equal to the bit |
| O3 | the same; a model and an optimizer all in fp16 do not train |
| loss_scale dynamic | common.update.LossScale |
| loss_scale NUMBER | a constant scale; steps with inf or nan gradients are skipped, the scale stays |
| combine_grad, check_combined_tensors | nothing: DDP's buckets and the fused optimizer do it |
| keep_batchnorm_fp32 | nothing: autocast keeps normalisation in fp32 |

There is no apex for this torch, so `--amp_backend apex` is refused or means native, as each project says.
"""

from __future__ import annotations

from dataclasses import dataclass

from common.errors import UsageError

LEVELS = ("O0", "O1", "O2", "O3")
BACKENDS = ("native", "apex")


@dataclass(frozen=True)
class MixedPrecision:
    """What the options come to: a precision (None: the project's default) and notes for the user."""

    precision: str | None
    notes: tuple[str, ...]


def translate(level: str | None, precision: str | None, combine_grad: bool = False) -> MixedPrecision:
    """The precision that an apex level stands for.

    Args:
        level: of --fp16_opt_level, None where it was not given.
        precision: of --precision, None likewise.
        combine_grad: whether --use_combine_grad was given.

    Raises:
        UsageError: no level of apex, or one that contradicts the precision.
    """
    notes = []
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
    if level in ("O2", "O3"):
        notes.append(f"--fp16_opt_level {level} is fp16 autocast, as O1: the parameters stay fp32")
    else:
        notes.append(f"--fp16_opt_level {level} is --precision {meant}")
    return MixedPrecision(meant, tuple(notes))
