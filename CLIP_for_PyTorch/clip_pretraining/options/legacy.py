"""Options of older command lines in today's words: what transformers 5 or this repo calls otherwise or needs no more.

Every command of the reference's README runs as typed. Nothing is dropped silently: each option that changes its meaning
is told once.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence

from common.errors import UsageError

RENAMED = {
    "evaluation_strategy": "eval_strategy",
    "feature_extractor_name": "image_processor_name",
    "distributed_process_group_timeout": "ddp_timeout",
}
# the repo's own spellings, equal in all projects: no warning
HOUSE = {
    "device": "device_name",
    "resume": "resume_from_checkpoint",
    "log_every": "logging_steps",
    "num_workers": "dataloader_num_workers",
    "epochs": "num_train_epochs",
    "batch_size": "per_device_train_batch_size",
}
DROPPED = {
    "use_combine_grad": "gradients are already combined: in DDP's buckets and in the fused optimizer",
    "overwrite_cache": "what is kept of captions and tokens is built anew whenever their file or the tokenizer changes",
    "use_fast_tokenizer": "transformers 5 has only the fast tokenizers",
    "preprocessing_num_workers": "captions are tokenised in batches by the tokenizer's own threads",
    "logging_dir": "TensorBoard files go to OUTPUT_DIR/tensorboard",
    "half_precision_backend": "mixed precision is torch's own",
    "use_ipex": "torch's CPU kernels are used",
    "group_by_length": "captions are padded to the longest of their batch in a few lengths",
    "trust_remote_code": "no code of a data set is run",
    "use_auth_token": "the hub login is used, or --token",
    "push_to_hub_token": "use --hub_token",
    "fp16_full_eval": "evaluation runs in the precision of training",
    "bf16_full_eval": "evaluation runs in the precision of training",
    "eval_accumulation_steps": "evaluation keeps one feature a picture and caption, nothing larger",
    "dataloader_pin_memory": "batches are pinned wherever there is an accelerator",
    "dataloader_persistent_workers": "each epoch starts its own workers, as a resumed one must",
    "torch_empty_cache_steps": "memory of the device is kept for the next step",
}


def translate(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """The command line in today's options, and a sentence for each one that changed.

    Options may be written `--name value` or `--name=value`, as before.

    Raises:
        UsageError: a value that has no meaning any more.
    """
    words: list[str] = []
    notes: list[str] = []
    for name, values in _options(argv):
        if name is None:
            words += values
        elif name in _SPECIAL:
            words += _SPECIAL[name](name, values, notes)
        elif name in DROPPED:
            notes.append(f"--{name} has no effect: {DROPPED[name]}")
        elif name in RENAMED:
            notes.append(f"--{name} is now --{RENAMED[name]}")
            words += [f"--{RENAMED[name]}", *values]
        else:
            words += [f"--{HOUSE.get(name, name)}", *values]
    return words, notes


def _options(argv: Sequence[str]) -> Iterator[tuple[str | None, list[str]]]:
    """(name, values) of each option; words before the first option as (None, [word])."""
    position = 0
    while position < len(argv):
        word = argv[position]
        position += 1
        if not word.startswith("--"):
            yield None, [word]
            continue
        name, has_value, value = word[2:].partition("=")
        values = [value] if has_value else []
        while not has_value and position < len(argv) and not argv[position].startswith("--"):
            values.append(argv[position])
            position += 1
        yield name.replace("-", "_"), values


def _opt_level(name: str, values: list[str], notes: list[str]) -> list[str]:
    level = values[0] if values else ""
    if level == "O0":
        notes.append("--fp16_opt_level O0 is now --precision fp32")
        return ["--precision", "fp32"]
    if level not in ("O1", "O2", "O3"):
        raise UsageError(f"--fp16_opt_level {level}: O0, O1, O2 or O3")
    notes.append(
        f"--fp16_opt_level {level}: with --fp16 it is torch's own mixed precision (fp32 weights, fp16 matrix products)"
    )
    return []


def _amp_backend(name: str, values: list[str], notes: list[str]) -> list[str]:
    if values != ["native"]:
        raise UsageError(f"--{name} {' '.join(values)}: transformers' Trainer has only torch's own; leave it out")
    return []


def _loss_scale(name: str, values: list[str], notes: list[str]) -> list[str]:
    if values == ["dynamic"]:
        return []
    notes.append(f"--loss_scale {' '.join(values)}: constant up to 65536; a larger scale begins there and adapts")
    return ["--loss_scale", *values]


def _optimizer(name: str, values: list[str], notes: list[str]) -> list[str]:
    if values and values[0] in ("adamw_apex_fused_npu", "adamw_apex_fused", "adamw_hf"):
        notes.append(f"--optim {values[0]} is now adamw_torch_fused: the same update in one kernel, on every device")
        values = ["adamw_torch_fused"]
    return ["--optim", *values]


def _save_every(name: str, values: list[str], notes: list[str]) -> list[str]:
    if values == ["0"]:
        return ["--save_strategy", "no"]
    return ["--save_strategy", "steps", "--save_steps", *values]


def _card(name: str, values: list[str], notes: list[str]) -> list[str]:
    """A card by number: the others are hidden. Under torchrun each rank's card follows from its LOCAL_RANK."""
    if len(values) != 1 or not values[0].removeprefix("-").isdecimal():
        raise UsageError(f"--{name} {' '.join(values)}: give the number of a card")
    if values != ["-1"] and "RANK" not in os.environ:
        for variable in ("CUDA_VISIBLE_DEVICES", "ASCEND_RT_VISIBLE_DEVICES"):
            os.environ.setdefault(variable, values[0])
        if values != ["0"]:
            notes.append(f"--{name} {values[0]}: this process sees only that card (CUDA/ASCEND_RT_VISIBLE_DEVICES)")
    elif values != ["-1"]:
        os.environ.setdefault("LOCAL_RANK", values[0])  # torch.distributed.launch without --use_env
    return []


def _warmup_ratio(name: str, values: list[str], notes: list[str]) -> list[str]:
    notes.append("--warmup_ratio is now --warmup_steps, where a value below 1 is a share of all steps")
    return ["--warmup_steps", *values]


def _no_cuda(name: str, values: list[str], notes: list[str]) -> list[str]:
    notes.append("--no_cuda is now --device cpu")
    return [] if values and values[0].lower() in ("false", "0") else ["--device_name", "cpu"]


_SPECIAL: dict[str, Callable[[str, list[str], list[str]], list[str]]] = {
    "fp16_opt_level": _opt_level,
    "amp_backend": _amp_backend,
    "loss_scale": _loss_scale,
    "optim": _optimizer,
    "save_every": _save_every,
    "local_rank": _card,
    "device_id": _card,
    "warmup_ratio": _warmup_ratio,
    "no_cuda": _no_cuda,
}
