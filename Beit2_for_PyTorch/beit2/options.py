"""Command line options that the entry scripts share, under the reference's names and with its defaults."""

from __future__ import annotations

import argparse
import copy
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timm.data.constants import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    IMAGENET_INCEPTION_MEAN,
    IMAGENET_INCEPTION_STD,
)

from beit2.training.schedule import cosine_schedule
from beit2.weights.download import local_file
from beit2.weights.files import read_checkpoint
from common import device as devices
from common.command_line.apex_options import BACKENDS, LEVELS, translate
from common.errors import UsageError

# Options of the reference that nothing reads, there or here, and what to use instead.
DEAD = {
    "warmup_lr": "the warm-up starts at 0",
    "decoupling_aug": "it never did anything",
    "eval_data_path": "pretraining has no evaluation; see run_class_finetuning.py",
    "dist_on_itp": "start with torchrun",
    "dist_url": "start with torchrun",
    "world_size": "start with torchrun",
    "local_rank": "start with torchrun",
    "local-rank": "start with torchrun",
    "enable_deepspeed": "ranks are DDP's: start with torchrun",
    "teacher_input_size": "the teacher's size is in its weights",
    "resplit": "it never did anything",
    "load-tar": "it never did anything",
    "weight_decay_end": "the tokenizer's weight decay is constant, there and here",
    "imagenet_default_mean_and_std": "--process_type imagenet_norm says how the tokenizer's pictures are normalised",
}


def truth(text: str) -> bool:
    """The reference's `bool_flag`: on/true/1 or off/false/0."""
    if text.lower() in ("on", "true", "1"):
        return True
    if text.lower() in ("off", "false", "0"):
        return False
    raise argparse.ArgumentTypeError(f"{text!r}: give on, true, 1 or off, false, 0")


class _DeadOption(argparse.Action):
    def __call__(self, parser, namespace, values, option_string=None) -> None:
        warnings.warn(f"{option_string} has no effect: {DEAD[option_string.lstrip('-')]}", stacklevel=2)


def add_dead_options(parser: argparse.ArgumentParser, *names: str) -> None:
    """Options that are accepted, with a warning, and do nothing."""
    for name in names:
        parser.add_argument(f"--{name}", action=_DeadOption, nargs="?", help=argparse.SUPPRESS)


def add_run_options(parser: argparse.ArgumentParser) -> None:
    """Device, output, resume and logging."""
    group = parser.add_argument_group("run")
    group.add_argument("--output_dir", default="output", help="checkpoints and logs")
    group.add_argument("--log_dir", default=None, help="TensorBoard's files; default: OUTPUT_DIR/tensorboard")
    group.add_argument("--device", default="auto", help="auto, npu, cuda or cpu")
    group.add_argument("--precision", choices=devices.PRECISIONS, help="default: bf16 on npu and cuda, fp32 on a CPU")
    group.add_argument("--loss_scale", default="dynamic", help="fp16: dynamic, or a number for a constant one")
    group.add_argument("--fp16_opt_level", choices=LEVELS, help="of apex: O0 is fp32, O1 and O2 are fp16")
    group.add_argument("--amp_backend", choices=BACKENDS, default="native", help="apex: what native does, with a note")
    group.add_argument("--use_combine_grad", action="store_true", help="of apex: accepted, without effect")
    group.add_argument("--seed", type=int, default=0)
    group.add_argument("--max_steps", type=int, default=0, help="stop after that many steps in all; 0 = no limit")
    group.add_argument("--case_kind", choices=("acc", "perf"), default="acc", help="perf: speed only, nothing saved")
    group.add_argument("--profile", action="store_true", help="record steps 10 to 12: OUTPUT_DIR/profile")
    group.add_argument("--log_every", type=int, default=10, help="steps between two lines of the log")
    group.add_argument("--save_every", type=int, default=0, help="steps between two saves inside an epoch; 0 = none")
    group.add_argument("--resume", default="", help="checkpoint file or URL, or 'auto'")
    group.add_argument("--replay", metavar="FILE", help="replay.json of a run that stopped: that one batch again")
    group.add_argument("--accept_changes", default="", metavar="NAMES", help="go on although these differ; or 'all'")
    group.add_argument("--auto_resume", action="store_true", default=True)
    group.add_argument("--no_auto_resume", action="store_false", dest="auto_resume")
    group.add_argument("--start_epoch", type=int, default=0)
    group.add_argument("--num_workers", type=int, default=min(10, devices.available_cores()))
    group.add_argument("--pin_mem", action="store_true", default=True)
    group.add_argument("--no_pin_mem", action="store_false", dest="pin_mem")
    add_dead_options(parser, "dist_on_itp", "dist_url", "world_size", "local_rank", "local-rank")


def add_optimizer_options(parser: argparse.ArgumentParser, *, lr: float, weight_decay: float) -> None:
    group = parser.add_argument_group("optimizer")
    group.add_argument("--opt", default="adamw")
    group.add_argument("--opt_eps", type=float, default=1e-8)
    group.add_argument("--opt_betas", type=float, nargs="+", default=None, help="default: the optimizer's own")
    group.add_argument("--clip_grad", type=float, default=None, help="largest gradient norm; default: no clipping")
    group.add_argument("--momentum", type=float, default=0.9)
    group.add_argument("--weight_decay", type=float, default=weight_decay)
    group.add_argument("--lr", type=float, default=lr)


def add_schedule_options(parser: argparse.ArgumentParser, *, min_lr: float) -> None:
    group = parser.add_argument_group("schedule")
    add_dead_options(parser, "warmup_lr")
    group.add_argument("--min_lr", type=float, default=min_lr)
    group.add_argument("--warmup_epochs", type=int, default=5)
    group.add_argument("--warmup_steps", type=int, default=-1, help="above 0: counts instead of --warmup_epochs")
    group.add_argument("--update_freq", type=int, default=1, help="micro-batches of one optimizer step")


def add_compile_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--compile", action="store_true", help="torch.compile of the blocks; not on npu")


def check_common(options: argparse.Namespace) -> None:
    """What argparse cannot check.

    Raises:
        UsageError: a number out of range, with the option's name.
    """
    for name in ("batch_size", "epochs", "update_freq", "log_every"):
        if getattr(options, name) < 1:
            raise UsageError(f"--{name} {getattr(options, name)}: must be at least 1")
    for name in ("max_steps", "save_every", "num_workers", "start_epoch", "weight_decay", "monitor_every"):
        if getattr(options, name, 0) < 0:
            raise UsageError(f"--{name} {getattr(options, name)}: must not be negative")
    if getattr(options, "monitor_data_path", "") and not options.monitor_every:
        raise UsageError(
            f"--monitor_data_path {options.monitor_data_path}: needs --monitor_every; give both or neither"
        )
    if not 0 <= getattr(options, "drop_path", 0) < 1:
        raise UsageError(f"--drop_path {options.drop_path}: must be at least 0 and below 1")
    if options.clip_grad is not None and options.clip_grad <= 0:
        raise UsageError(f"--clip_grad {options.clip_grad}: must be above 0; without the option nothing is clipped")
    if not options.output_dir:
        raise UsageError("--output_dir is empty: name a folder for checkpoints and logs")
    if options.opt_betas is not None and len(options.opt_betas) != 2:
        raise UsageError(f"--opt_betas {options.opt_betas}: give two numbers")


def pick_precision(options: argparse.Namespace, device: torch.device) -> str:
    """The precision asked for; by default bf16 on an accelerator and fp32 on a CPU."""
    return options.precision or ("fp32" if device.type == "cpu" else "bf16")


def parse(parser: argparse.ArgumentParser, argv: list[str] | None) -> argparse.Namespace:
    """Parses and checks; warnings are printed without their place in the source."""
    warnings.formatwarning = lambda message, *rest, **more: f"warning: {message}\n"
    options = parser.parse_args(argv)
    check_common(options)
    mixed = translate(options.fp16_opt_level, options.precision, options.use_combine_grad)
    options.precision = mixed.precision
    if options.amp_backend == "apex":
        warnings.warn("--amp_backend apex: there is no apex for this torch; torch's own mixed precision", stacklevel=2)
    for note in mixed.notes:
        warnings.warn(note, stacklevel=2)
    options.given = _given(parser, argv)
    return options


def _given(parser: argparse.ArgumentParser, argv: list[str] | None) -> list[str]:
    """The names of the options that the command line has, in spite of their defaults."""
    bare = copy.deepcopy(parser)
    bare._defaults = {}
    for action in bare._actions:
        action.default = argparse.SUPPRESS
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # they were heard already
        return sorted(vars(bare.parse_args(argv)))


def checkpoint_to_evaluate(
    options: argparse.Namespace, location: str, names: str, advice: str
) -> tuple[Path, dict[str, Any]]:
    """A checkpoint's file and content; those of `names` that the command line leaves open become the checkpoint's.

    Raises:
        UsageError: none given (with `advice`), or not readable.
    """
    if not location or location == "auto":
        raise UsageError(advice)
    path = local_file(location)
    checkpoint = read_checkpoint(path)
    for name in names.split():
        if name not in options.given and hasattr(checkpoint.get("args"), name):
            setattr(options, name, getattr(checkpoint["args"], name))
    return path, checkpoint


def given_patch_size(options: argparse.Namespace) -> dict[str, int]:
    """--patch_size as an argument of a model; without the option the model's name says it.

    Raises:
        UsageError: --input_size is no multiple of it.
    """
    if options.patch_size is None:
        return {}
    if options.patch_size < 1 or options.input_size % options.patch_size:
        raise UsageError(
            f"--patch_size {options.patch_size}: --input_size {options.input_size} must be a multiple of it"
        )
    return {"patch_size": options.patch_size}


def mean_and_std(options: argparse.Namespace) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Of the model's pictures."""
    if options.imagenet_default_mean_and_std:
        return IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
    return IMAGENET_INCEPTION_MEAN, IMAGENET_INCEPTION_STD


def schedule(options: argparse.Namespace, steps: int) -> np.ndarray:
    """The learning rate of every step.

    Raises:
        UsageError: a warm-up longer than the training.
    """
    warmup = {"warmup_epochs": options.warmup_epochs, "warmup_steps": options.warmup_steps}
    try:
        return cosine_schedule(options.lr, options.min_lr, options.epochs, steps, **warmup)
    except ValueError as error:
        raise UsageError(str(error)) from error


def schedules(options: argparse.Namespace, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """Learning rate and weight decay of every step.

    Raises:
        UsageError: a warm-up longer than the training.
    """
    end = options.weight_decay if options.weight_decay_end is None else options.weight_decay_end
    return schedule(options, steps), cosine_schedule(options.weight_decay, end, options.epochs, steps)
