"""The parser of run_clip.py: `transformers`' own, but a mistake is one line, and the help a screen or two."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import re
from collections.abc import Sequence

from transformers import HfArgumentParser

from common.errors import UsageError

# those of `transformers.TrainingArguments` that one uses here, in our spelling where there is one
_USUAL = {
    "output_dir": "Results, checkpoints and the last model.",
    "do_train": "Train.",
    "do_eval": "Evaluate at the end, and while training as --eval_strategy says.",
    "eval_strategy": "no, steps (every --eval_steps) or epoch.",
    "epochs": "Passes over the pairs (--num_train_epochs).",
    "max_steps": "Steps instead of epochs.",
    "batch_size": "Pairs a device and chunk (--per_device_train_batch_size).",
    "gradient_accumulation_steps": "Chunks of a step; the negatives come from all of them.",
    "per_device_eval_batch_size": "Pairs an evaluated batch; its loss depends on it.",
    "learning_rate": "Highest rate of the schedule.",
    "lr_scheduler_type": "linear, cosine, constant, constant_with_warmup, ...",
    "warmup_steps": "Steps of warm-up; below 1 a share of all.",
    "weight_decay": "Of everything but LayerNorm and biases.",
    "optim": "adamw_torch_fused, adamw_torch, adafactor, sgd, adagrad, rmsprop.",
    "max_grad_norm": "Clip the gradient's norm; 0 clips nothing.",
    "seed": "Of new weights, order and dropout.",
    "save_every": "Steps between two checkpoints; 0: none.",
    "save_total_limit": "Keep only so many checkpoints.",
    "resume": "auto, or a checkpoint's folder.",
    "log_every": "Steps between two lines of the log.",
    "num_workers": "Processes that decode pictures.",
    "dataloader_drop_last": "Leave out the last, smaller batch.",
    "gradient_checkpointing": "Less memory for 30 % more time.",
    "torch_compile": "Compile the model.",
    "fsdp": "full_shard: spread model and optimizer over the ranks.",
}
_INTERNAL = ("device_name", "case_kind", "logging_steps", "report_to", "disable_tqdm", "logging_nan_inf_filter")
_INTERNAL += ("ddp_find_unused_parameters", "ddp_broadcast_buffers", "remove_unused_columns")


class OptionParser(HfArgumentParser):
    """As `HfArgumentParser`, whose usage text alone is 130 lines, and with it every mistake's message."""

    def error(self, message: str) -> None:
        raise UsageError(f"options: {message}")

    def parse(self, argv: Sequence[str]) -> tuple:
        """The groups of options.

        Raises:
            UsageError: unknown, or a value that cannot be read.
        """
        try:
            return self.parse_args_into_dataclasses(list(argv))
        except ValueError as error:
            unknown = re.search(r"not used by the HfArgumentParser: \['(--?[\w-]+)", str(error))
            raise UsageError(f"options: {self._nearest(unknown[1]) if unknown else error}") from None

    def _nearest(self, word: str) -> str:
        known = [name for action in self._actions for name in action.option_strings]
        near = difflib.get_close_matches(word, [*known, *(f"--{name}" for name in _USUAL)], n=1)
        return f"unknown option {word}" + (f", did you mean {near[0]}?" if near else "; --help lists them")

    def format_short_help(self, description: str) -> str:
        """Our options and the usual ones of the Trainer, a line each."""
        ours = {a.dest: a for a in self._actions if not a.option_strings[0].startswith("--no_")}
        lines = [
            "usage: run_clip.py --OPTION VALUE ...",
            "",
            description.strip(),
            "",
            "Each of the Trainer's other options works as well: --help_all lists them.",
        ]
        for group in self.dataclass_types:
            names = [f.name for f in dataclasses.fields(group) if f.name in group.__annotations__]
            lines += ["", (group.__doc__ or "").strip().splitlines()[0]]
            lines += [_line(name, _help_of(ours[name]), ours[name].default) for name in names if name not in _INTERNAL]
        lines += ["", "Training and evaluation, as in `transformers.TrainingArguments`."]
        lines += [_line(name, text, ours[name].default if name in ours else None) for name, text in _USUAL.items()]
        return "\n".join([*lines, _line("device", "auto, npu, cuda or cpu.", "auto"), ""])


def _help_of(action: argparse.Action) -> str:
    return action.help or ""


def _line(name: str, text: str, default: object) -> str:
    shown = "" if default is None or default is False or default == "" else f" [{default}]"
    return f"  --{name:<28} {text}{shown}"
