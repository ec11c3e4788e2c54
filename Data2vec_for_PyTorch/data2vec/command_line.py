"""The scripts' command line: Hydra's spelling, as fairseq's users have it, plus the house's."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig

from common import device as devices
from common.checkpoint_file import CheckpointError, load
from common.command_line.apex_options import BACKENDS, LEVELS, translate
from common.errors import UsageError
from data2vec.config import checkpoint_path, load_config
from data2vec.config.keys import FULLY_SHARDED

TEXT_CONFIGS, FINE_TUNING_CONFIGS = "configs/text/pretraining", "configs/text/finetuning"
FINE_TUNING = "sentence_prediction"
# the house's flags that are keys by another name
FLAGS = {
    "seed": "common.seed",
    "log_every": "common.log_interval",
    "save_every": "checkpoint.save_interval_updates",
    "num_workers": "dataset.num_workers",
}


def is_sharded(config: DictConfig) -> bool:
    return config.distributed_training.ddp_backend == FULLY_SHARDED


def parse(argv: list[str] | None, description: str) -> tuple[argparse.Namespace, DictConfig, list[str]]:
    """(options, configuration, notes about keys without effect). Errors are UsageError."""
    options = _options(argv, description)
    config, notes = load_config(options.config_dir, options.config_name, options.overrides)
    if config.task._name == FINE_TUNING:
        raise UsageError(f"--config-name {options.config_name}: task._name={FINE_TUNING} is for finetune.py")
    return options, config, [*notes, *_apply(options, config)]


def parse_finetuning(
    argv: list[str] | None, description: str
) -> tuple[argparse.Namespace, DictConfig, list[str], dict[str, Any] | None]:
    """(options, configuration, notes, the pretrained checkpoint if any) of finetune.py. Errors are UsageError.

    The checkpoint's "model" is the encoder alone, and the configuration has its sizes.
    """
    options = _options(argv, description, FINE_TUNING_CONFIGS)
    place = (options.config_dir, options.config_name)
    path = checkpoint_path(*place, options.overrides, "checkpoint.finetune_from_model")
    pretrained, sizes = (None, []) if path in (None, "none") else _encoder_of(Path(path))
    config, notes = load_config(*place, [*sizes, *options.overrides])
    if config.task._name != FINE_TUNING:
        raise UsageError(f"--config-name {options.config_name}: task._name={config.task._name} is for train.py")
    notes += _apply(options, config)
    if is_sharded(config):
        raise UsageError(
            "--parallel fsdp (distributed_training.ddp_backend=fully_sharded) is for train.py: leave it out"
        )
    return options, config, notes, pretrained


def _encoder_of(path: Path) -> tuple[dict[str, Any], list[str]]:
    """(a text checkpoint or a Hugging Face folder with the encoder's weights alone, its sizes as overrides)."""
    from data2vec.weights.pretrained import architecture, encoder_weights

    try:
        if path.is_dir():
            from data2vec.weights.huggingface import load_huggingface

            checkpoint = load_huggingface(path)
        else:
            checkpoint = load(path)
        weights = encoder_weights(checkpoint, path)
    except CheckpointError as error:
        raise UsageError(f"checkpoint.finetune_from_model: {error}") from None
    sizes = [f"{key}={value}" for key, value in architecture(weights, checkpoint).items()]
    return {"model": weights, "extra_state": checkpoint.get("extra_state")}, sizes


def parse_evaluation(
    argv: list[str] | None, description: str, config_dir: str = TEXT_CONFIGS
) -> tuple[argparse.Namespace, DictConfig, list[str], dict[str, Any]]:
    """(options, configuration, notes, checkpoint) for a program that looks at the checkpoint common_eval.path.

    Task and model are the checkpoint's own, as in fairseq; overrides come on top. Errors are UsageError.
    """
    options = _options(argv, description, config_dir)
    for flag in ("replay", "resume", "accept_changes", "compile", "parallel"):
        if value := getattr(options, flag):
            given = f"--{flag}" if value is True else f"--{flag} {value}"
            raise UsageError(f"{given}: is of a training; this program looks at a checkpoint")
    path = checkpoint_path(options.config_dir, options.config_name, options.overrides)
    if not path:
        raise UsageError("common_eval.path is not set: give the checkpoint, common_eval.path=FILE")
    try:
        checkpoint = load(path)
    except CheckpointError as error:
        raise UsageError(str(error)) from None
    stored = checkpoint.get("cfg") if isinstance(checkpoint, dict) else None
    stored = stored if isinstance(stored, dict) else None
    _check_task(path, stored, config_dir == FINE_TUNING_CONFIGS)
    config, notes = load_config(options.config_dir, options.config_name, options.overrides, stored)
    if stored is None:
        notes.append(f"{path} has no configuration of its own: {options.config_name}'s is used")
    return options, config, [*notes, *_apply(options, config)], checkpoint


def _check_task(path: str, stored: dict[str, Any] | None, wants_tuned: bool) -> None:
    """UsageError where the checkpoint is of pretraining and a fine-tuned one is wanted, or the other way round."""
    task = stored.get("task") if stored else None
    is_tuned = isinstance(task, dict) and task.get("_name") == FINE_TUNING
    if wants_tuned and not is_tuned:
        raise UsageError(f"{path}: no checkpoint of finetune.py, as predict.py needs it: fine-tune it first")
    if is_tuned and not wants_tuned:
        raise UsageError(f"{path}: a checkpoint of finetune.py, for predict.py; here one of train.py is needed")


def _options(argv: list[str] | None, description: str, config_dir: str = TEXT_CONFIGS) -> argparse.Namespace:
    """The command line; the house's flags become overrides."""
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False)
    parser.add_argument("--config-dir", "-cd", default=config_dir, help="folder of YAML files")
    parser.add_argument("--config-name", "-cn", required=True, help="name of a YAML file in it, e.g. base")
    parser.add_argument(
        "-m", "--multirun", action="store_true", help="accepted: fairseq-hydra-train's commands have it"
    )
    parser.add_argument("overrides", nargs="*", help="group.key=value, e.g. task.data=DIR")
    parser.add_argument("--output_dir", default="output")
    parser.add_argument("--device", choices=devices.DEVICES, default="auto")
    parser.add_argument("--precision", choices=devices.PRECISIONS, help="over common.fp16 and common.bf16")
    parser.add_argument("--loss_scale", help="fp16: dynamic (fairseq's rules), or a number for a constant one")
    parser.add_argument("--fp16_opt_level", choices=LEVELS, help="of apex: O0 is fp32, O1 and O2 are fp16")
    parser.add_argument("--use_combine_grad", action="store_true", help="of apex: accepted, without effect")
    parser.add_argument("--amp_backend", choices=BACKENDS, default="native", help="apex is refused")
    parser.add_argument("--seed", type=int, help="over common.seed")
    parser.add_argument("--max_steps", type=int, default=0, help="stop when this many updates are done; 0: no limit")
    parser.add_argument("--case_kind", choices=("acc", "perf"), default="acc")
    parser.add_argument("--profile", action="store_true", help="record updates 10 to 12: OUTPUT_DIR/profile")
    parser.add_argument("--parallel", choices=("ddp", "fsdp"), help="train.py: over distributed_training.ddp_backend")
    parser.add_argument("--compile", action="store_true", help="trainings: torch.compile of the blocks; not on npu")
    parser.add_argument("--log_every", type=int, help="over common.log_interval")
    parser.add_argument("--save_every", type=int, help="over checkpoint.save_interval_updates")
    parser.add_argument("--num_workers", type=int, help="over dataset.num_workers")
    parser.add_argument("--resume", help="auto (checkpoint.restore_file when it exists), none, or a checkpoint")
    parser.add_argument("--replay", metavar="FILE", help="replay.json of a run that stopped: that one batch again")
    parser.add_argument(
        "--accept_changes", default="", metavar="NAMES", help="go on from a checkpoint in spite of these differences"
    )
    options = parser.parse_intermixed_args(argv)
    if options.replay == "":
        raise UsageError("--replay is empty: give the replay.json of a run that stopped, or leave it out")
    if options.amp_backend == "apex":
        raise UsageError("--amp_backend apex: the loss is scaled by fairseq's rules, which apex has not; leave it out")
    flags = [f"{key}={getattr(options, flag)}" for flag, key in FLAGS.items() if getattr(options, flag) is not None]
    options.overrides += flags
    return options


def _apply(options: argparse.Namespace, config: DictConfig) -> list[str]:
    """Brings flags into the configuration; returns notes."""
    if options.resume not in (None, "auto") and not (options.replay and options.resume == "none"):
        config.checkpoint.restore_file = options.resume
    if config.common.cpu:
        options.device = "cpu"
    if options.parallel:
        config.distributed_training.ddp_backend = FULLY_SHARDED if options.parallel == "fsdp" else "legacy_ddp"
    if options.loss_scale not in (None, "dynamic"):
        _set_constant_scale(options.loss_scale, config)
    mixed = translate(options.fp16_opt_level, options.precision, options.use_combine_grad)
    options.precision = mixed.precision
    return mixed.notes


def _set_constant_scale(text: str, config: DictConfig) -> None:
    """Neither doubled nor halved: fairseq's dynamic rules with an endless window and the scale as their threshold."""
    try:
        scale = float(text)
    except ValueError:
        raise UsageError(f"--loss_scale {text}: give 'dynamic' or a number") from None
    if scale <= config.common.min_loss_scale:
        raise UsageError(f"--loss_scale {text}: must be above common.min_loss_scale={config.common.min_loss_scale}")
    config.common.fp16_init_scale = config.common.threshold_loss_scale = scale
    config.common.fp16_scale_window = 2**62


def choose_precision(options: argparse.Namespace, config: DictConfig, device: torch.device) -> tuple[str, str | None]:
    """(precision, note). fp16 of a YAML file is meant for accelerators: a CPU runs fp32 and says so."""
    if options.precision:
        return options.precision, None
    if config.common.bf16:
        return "bf16", None
    if config.common.fp16 and device.type == "cpu":
        return "fp32", "common.fp16 is for accelerators: this CPU run is in fp32 (--precision fp16 or bf16 to insist)"
    return ("fp16" if config.common.fp16 else "fp32"), None


def start_ranks(config: DictConfig, device_name: str) -> None:
    """Replaces this process by torchrun when several ranks are asked for and we are not one of them.

    fairseq spawns its processes from `distributed_training.distributed_world_size`; so does this.
    """
    wanted = config.distributed_training.distributed_world_size
    if "RANK" in os.environ:
        size = int(os.environ.get("WORLD_SIZE", "1"))
        if size != wanted and int(os.environ["RANK"]) == 0:
            print(f"distributed_training.distributed_world_size={wanted}: torchrun started {size} ranks, which counts")
        config.distributed_training.distributed_world_size = size
        return
    if wanted <= 1:
        return
    device = devices.resolve(device_name)
    here = wanted if device.type == "cpu" else torch.get_device_module(device).device_count()
    if wanted > here or (device.type == "cpu" and wanted > devices.available_cores()):
        have = f"{here} {device.type} devices" if device.type != "cpu" else f"{devices.available_cores()} CPU cores"
        raise UsageError(
            f"distributed_training.distributed_world_size={wanted}, but this host has {have}: start train.py with "
            "torchrun on every host, or say distributed_training.distributed_world_size=1"
        )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={wanted}", *sys.argv]
    sys.stdout.flush()
    os.execv(sys.executable, command)
