"""The teacher: an exponential moving average of the student (fairseq/modules/ema_module.py)."""

from __future__ import annotations

import torch


def ema_decay_at(num_updates: int, start: float, end: float, anneal_steps: int) -> float:
    """Decay after `num_updates` updates: linear from `start` to `end` over `anneal_steps`, then `end`."""
    if start == end or num_updates >= anneal_steps:
        return end
    return end - (end - start) * (1 - num_updates / anneal_steps)


def _own_part(tensor: torch.Tensor) -> torch.Tensor:
    """Of a sharded one this rank's part, which is the same for student and teacher."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


@torch.no_grad()
def ema_step(model: torch.nn.Module, decay: float) -> None:
    """teacher = decay * teacher + (1 - decay) * student, in fp32; the first call makes the teacher, a copy.

    fairseq steps the teacher when the *next* update begins, so a checkpoint holds it one update behind. With
    `ema_transformer_layers_only` the embeddings are copied instead. They are not shared with the student for good:
    validation after an update would then see other embeddings than the reference's.
    """
    holder = model.teacher_holder
    if holder.teacher is None:
        holder.make_teacher()
        return
    if decay >= 1:
        return
    averaged, copied = [], []
    teacher = dict(holder.teacher.named_parameters())
    for name, parameter in holder.student.named_parameters():
        if name not in teacher:  # data2vec 2.0's has no decoder
            continue
        copies = bool(model.copied_to_teacher) and name.startswith(model.copied_to_teacher)
        (copied if copies else averaged).append((_own_part(teacher[name]), _own_part(parameter).float()))
    if averaged:
        torch._foreach_lerp_([t for t, _ in averaged], [s for _, s in averaged], 1 - decay)
    if copied:
        torch._foreach_copy_([t for t, _ in copied], [s for _, s in copied])
