"""What is wrong with the options, in one sentence, before anything is read: ranges, files, and what excludes what."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import TYPE_CHECKING

from common.errors import UsageError

if TYPE_CHECKING:
    from clip_pretraining.options.arguments import ClipTrainingArguments, DataArguments, ModelArguments

# what torch and transformers have by themselves; each goes through the guarded step (test_guarded_step.py)
OPTIMIZERS = ("adamw_torch_fused", "adamw_torch", "adafactor", "sgd", "adagrad", "rmsprop")
_LARGEST = float(2**31)
# option: (least, largest, whether the least itself is allowed); every one must be finite
RANGES: dict[str, tuple[float, float, bool]] = {
    "learning_rate": (0, 100, False),
    "weight_decay": (0, 100, True),
    "adam_beta1": (0, 1 - 1e-9, True),
    "adam_beta2": (0, 1 - 1e-9, True),
    "adam_epsilon": (0, 1, False),
    "max_grad_norm": (0, _LARGEST, True),
    "warmup_steps": (0, _LARGEST, True),
    "num_train_epochs": (0, _LARGEST, False),
    "max_steps": (-1, _LARGEST, True),
    "logging_steps": (0, _LARGEST, False),
    "save_steps": (0, _LARGEST, False),
    "eval_steps": (0, _LARGEST, False),
    "save_total_limit": (0, _LARGEST, True),
    "skip_steps": (0, _LARGEST, True),
    "loss_scale": (0, 2.0**60, False),
    "seed": (0, 2**63 - 1, True),
    "data_seed": (0, 2**63 - 1, True),
    "micro_batch_size": (1, _LARGEST, True),
    "per_device_train_batch_size": (1, _LARGEST, True),
    "per_device_eval_batch_size": (1, _LARGEST, True),
    "dataloader_num_workers": (0, 4096, True),
    "dataloader_prefetch_factor": (1, 4096, True),
    "keep_patches": (0, 1, False),
    "ema_decay": (0, 1 - 1e-9, True),
    "lora_rank": (0, 4096, True),
    "lora_alpha": (0, 65536, False),
    "random_crop": (0, 1, False),
    "max_bad_share": (0, 1, True),
    "validation_share": (0, 0.9, False),
    "max_train_samples": (1, _LARGEST, True),
    "max_eval_samples": (1, _LARGEST, True),
    "max_seq_length": (3, 65536, True),
}


def check(model: ModelArguments, data: DataArguments, training: ClipTrainingArguments) -> None:
    """Raises UsageError on the first option that cannot be meant."""
    for options in (data, training):
        check_ranges(options)
    if training.replay == "":
        raise UsageError("--replay is empty: give the replay.json of a run that stopped, or leave it out")
    _check_task(training)
    _check_data(data, training)
    _check_training(training)
    if model.model_name_or_path and Path(model.model_name_or_path).is_file():
        raise UsageError(f"--model_name_or_path {model.model_name_or_path}: give the folder, not a file in it")


def check_ranges(options: object) -> None:
    """Every number of `options` that RANGES knows lies within them; one that was not given (None) is passed over."""
    for name, (least, largest, inclusive) in RANGES.items():
        value = getattr(options, name, None)
        if not isinstance(value, int | float):
            continue
        if not math.isfinite(value) or value > largest or value < least or (value == least and not inclusive):
            bound = f"at least {least:g}" if inclusive else f"above {least:g}"
            spoken = "per_device_train_batch_size" if name == "micro_batch_size" else name
            raise UsageError(f"--{spoken} {value}: must be {bound} and at most {largest:g}")


def wants_shards(training: ClipTrainingArguments) -> bool:
    """Whether --fsdp asks for a sharded model. UsageError for a kind that is not there, or what does not go with it."""
    if not training.fsdp:
        return False
    kind = str(training.fsdp).lower()
    if kind not in ("true", "full_shard", "full_shard auto_wrap") or training.fsdp_config:
        asked = f"--fsdp {training.fsdp}" + (" with --fsdp_config" if training.fsdp_config else "")
        raise UsageError(f"{asked}: there is --fsdp full_shard, layer by layer, without further options")
    if training.torch_compile or training.torch_compile_backend or training.torch_compile_mode:
        raise UsageError("--fsdp and --torch_compile: gathering a layer ends the compiled graph; leave one of them out")
    if not training.optim.startswith("adamw"):
        raise UsageError(f"--fsdp with --optim {training.optim}: only AdamW was tried with shards")
    return True


def _check_task(training: ClipTrainingArguments) -> None:
    if not (training.do_train or training.do_eval):
        raise UsageError("nothing to do: give --do_train, --do_eval or both")
    if training.do_predict:
        raise UsageError(
            "--do_predict does not exist here (nor does it work in the reference): --do_eval reports retrieval"
        )
    if training.eval_strategy != "no" and not training.do_eval:
        raise UsageError(f"--eval_strategy {training.eval_strategy}: add --do_eval, and what to evaluate on")
    if training.zero_shot_dir and not os.path.isdir(training.zero_shot_dir):
        raise UsageError(f"--zero_shot_dir {training.zero_shot_dir}: no such folder")
    if training.zero_shot_dir and not training.do_eval:
        raise UsageError("--zero_shot_dir is for evaluation: add --do_eval")
    if (training.class_names or training.templates) and not training.zero_shot_dir:
        raise UsageError("--class_names and --templates describe the pictures of --zero_shot_dir: give that too")
    if Path(training.output_dir).exists() and not Path(training.output_dir).is_dir():
        raise UsageError(f"--output_dir {training.output_dir}: a file; name a folder")


def _check_data(data: DataArguments, training: ClipTrainingArguments) -> None:
    if data.dataset_name and data.dataset_name.rsplit("/", 1)[-1] != "coco_dataset_script":
        raise UsageError(
            f"--dataset_name {data.dataset_name}: only ydshieh/coco_dataset_script is known by name; other pairs come "
            "as --train_file (.csv, .tsv, .jsonl) or --train_shards (tars)"
        )
    if data.dataset_config_name not in (None, "2017"):
        raise UsageError(f"--dataset_config_name {data.dataset_config_name}: only 2017 is known")
    for split, needed in (("train", training.do_train), ("validation", training.do_eval)):
        file, shards = getattr(data, f"{split}_file"), getattr(data, f"{split}_shards")
        if file and shards:
            raise UsageError(f"--{split}_file and --{split}_shards: give one of them")
        if needed and not (file or shards or data.data_dir or (split == "validation" and data.validation_share)):
            raise UsageError(f"no {split} pairs: give --data_dir (COCO), --{split}_file or --{split}_shards")
    if data.random_crop < 1 and data.crop_cache:
        raise UsageError("--random_crop is another crop in every epoch, --crop_cache keeps one: leave one of them out")
    if data.validation_share:
        if data.validation_file or data.validation_shards:
            raise UsageError("--validation_share and validation pairs of their own: give one of them")
        if not (data.train_file or data.train_shards):
            raise UsageError("--validation_share is of --train_file or --train_shards: COCO has a validation split")
    if data.delimiter is not None:
        data.delimiter = data.delimiter.replace("\\t", "\t")  # as a shell passes it
        if len(data.delimiter) != 1:
            raise UsageError(f"--delimiter {data.delimiter!r}: must be one character")
    for name in ("train_file", "validation_file", "train_shards", "validation_shards"):
        if not all((getattr(data, name) or "-").split("::")):
            raise UsageError(f"--{name} {getattr(data, name)}: nothing on one side of a ::; give a file there")
    tables = [part for file in (data.train_file, data.validation_file) if file for part in file.split("::")]
    for path in (*tables, training.class_names, training.templates):
        if path and not os.path.isfile(path):
            raise UsageError(f"{path}: no such file")
    _check_sampling(data, training)


def _check_sampling(data: DataArguments, training: ClipTrainingArguments) -> None:
    """Raises UsageError for weights that do not fit the sources; they are numbers from here on."""
    if training.source_weights is None:
        return
    weights, sources = training.source_weights, (data.train_file or data.train_shards or "").split("::")
    try:
        training.source_weights = [float(word) for word in weights.split("::")]
    except ValueError:
        raise UsageError(f"--source_weights {weights}: give numbers with :: between, such as 3::1") from None
    if len(training.source_weights) != len(sources):
        raise UsageError(
            f"--source_weights {weights}: {len(training.source_weights)} weights for {len(sources)} parts of "
            "--train_file or --train_shards: give one for each, with :: between"
        )
    if not all(0 <= weight for weight in training.source_weights) or not 0 < sum(training.source_weights) < math.inf:
        raise UsageError(f"--source_weights {weights}: each must be at least 0, and one above it; give such as 3::1")


def _check_training(training: ClipTrainingArguments) -> None:
    if training.optim not in OPTIMIZERS:
        raise UsageError(f"--optim {training.optim}: choose one of {', '.join(OPTIMIZERS)}")
    if training.lora_alpha is not None and not training.lora_rank:
        raise UsageError("--lora_alpha is the factor of --lora_rank's additions: give that too")
    if training.label_smoothing_factor:
        raise UsageError(
            "--label_smoothing_factor: the targets are which caption belongs to which picture; leave it out"
        )
    if training.load_best_model_at_end:
        raise UsageError("--load_best_model_at_end: the best model is kept in OUTPUT_DIR/best; leave it out")
    if training.auto_find_batch_size:
        raise UsageError(
            "--auto_find_batch_size: another batch has other negatives; lower --per_device_train_batch_size and raise "
            "--gradient_accumulation_steps, which keeps the large batch's loss"
        )
