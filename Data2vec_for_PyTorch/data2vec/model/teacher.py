"""A student that carries its teacher: a copy that is no submodule, has no gradients, and travels in the state_dict."""

from __future__ import annotations

import copy

from torch import nn


class WithTeacher(nn.Module):
    """Base of the module whose state_dict holds the teacher under fairseq's key, `<prefix>_ema`.

    A subclass defines `student`: the module that the teacher is an exponential moving average of.
    """

    def __init__(self):
        super().__init__()
        self.__dict__["teacher"] = None  # a module once there is one
        self.register_state_dict_post_hook(_save_teacher)
        self.register_load_state_dict_pre_hook(_load_teacher)

    @property
    def student(self) -> nn.Module:
        raise NotImplementedError

    def make_teacher(self) -> nn.Module:
        """A copy of the student as it is now, in fp32 and without gradients."""
        self.__dict__["teacher"] = None  # where the student is this module, its copy has no teacher of its own
        teacher = copy.deepcopy(self.student).float().requires_grad_(False).eval()
        self.__dict__["teacher"] = teacher
        return teacher

    def _apply(self, fn, recurse: bool = True):
        super()._apply(fn, recurse)
        if self.teacher is not None:
            self.teacher._apply(fn, recurse)
        return self


def _save_teacher(holder: WithTeacher, state: dict, prefix: str, local_metadata) -> None:
    if holder.teacher is not None:
        state[prefix + "_ema"] = dict(holder.teacher.state_dict())


def _load_teacher(holder: WithTeacher, state: dict, prefix: str, *_) -> None:
    """Without a teacher in the state it becomes a copy of the loaded student when next needed (fairseq's start)."""
    ema = state.pop(prefix + "_ema", None)
    holder.__dict__["teacher"] = None
    if ema is not None:
        holder.make_teacher().load_state_dict(ema)
