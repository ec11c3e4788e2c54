"""Configurations in fairseq's form: a YAML file and dotted overrides, with every key accounted for."""

from __future__ import annotations

import ast
import difflib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from common.errors import UsageError
from data2vec.config.config_values import checked_value

DEFAULTS = Path(__file__).with_name("fairseq_defaults.yaml")
VISION_DEFAULTS = Path(__file__).with_name("vision_defaults.yaml")

# Accepted with any value, without effect here. They concern machinery that does not exist in this project, or a result
# that does not depend on them; a note says so once.
WITHOUT_EFFECT = {
    "common.user_dir": "the model is part of this project",
    "common.tensorboard_logdir": "TensorBoard files go to --output_dir/tensorboard",
    "common.no_progress_bar": "the progress bar shows on a terminal only",
    "common.log_file": "the launcher writes train_<device>.log",
    "common.empty_cache_freq": "memory is not emptied between steps",
    "common.all_gather_list_size": "there is no such buffer here",
    "common.suppress_crashes": "a crash is reported as one",
    "distributed_training.ddp_backend": "gradients are reduced in one flat buffer, as legacy_ddp does",
    "distributed_training.distributed_backend": "the backend follows from the device",
    "distributed_training.distributed_port": "torchrun chooses it",
    "distributed_training.distributed_no_spawn": "torchrun starts the processes",
    "distributed_training.device_id": "the device follows from the local rank",
    "distributed_training.nprocs_per_node": "torchrun --nproc_per_node says it",
    "distributed_training.find_unused_parameters": "gradients are reduced in one flat buffer",
    "distributed_training.bucket_cap_mb": "gradients are reduced in one flat buffer",
    "distributed_training.broadcast_buffers": "there are no buffers to broadcast",
    "checkpoint.reset_lr_scheduler": "the schedule follows from the number of updates",
    "dataset.data_buffer_size": "each loader worker keeps two batches ready",
    "dataset.ignore_unused_valid_subsets": "only dataset.valid_subset is read",
    "dataset.fixed_validation_seed": "validation draws nothing",
    "dataset.dataset_impl": "the index file says what it is",
    "task.include_index": "the sample's index always travels with it",
    "task.seed": "common.seed is used",
    "model.load_checkpoint_heads": "the head is loaded when the checkpoint has one",
    "criterion.log_keys": "what is logged is fixed",
    "criterion.can_sum": "losses are summed",
}
# Accepted only with this value, fairseq's default: any other would change what is computed.
ONLY_DEFAULT: dict[str, Any] = {
    "common.amp": False,
    "common.tpu": False,
    "common.memory_efficient_fp16": False,
    "common.memory_efficient_bf16": False,
    "common.model_parallel_size": 1,
    "common.quantization_config_path": None,
    "checkpoint.best_checkpoint_metric": "loss",
    "checkpoint.maximize_best_checkpoint_metric": False,
    "checkpoint.keep_last_epochs": -1,
    "checkpoint.keep_best_checkpoints": -1,
    "checkpoint.keep_interval_updates_pattern": -1,
    "checkpoint.no_last_checkpoints": False,
    "checkpoint.no_save_optimizer_state": False,
    "checkpoint.optimizer_overrides": "{}",
    "checkpoint.patience": -1,
    "checkpoint.reset_meters": False,
    "dataset.curriculum": 0,
    "dataset.num_shards": 1,
    "dataset.shard_id": 0,
    "dataset.grouped_shuffling": False,
    "dataset.update_epoch_batch_itr": False,
    "dataset.update_ordered_indices_seed": False,
    "dataset.combine_valid_subsets": None,
    "optimization.sentence_avg": False,
    "optimization.stop_min_lr": -1.0,
    "optimization.use_bmuf": False,
    "optimization.skip_remainder_batch": False,
    "optimizer.use_old_adam": False,
    "optimizer.fp16_adam_stats": False,
    "task.mask_whole_words": False,
    "task.shorten_method": "none",
    "task.shorten_data_split_list": "",
    "task.skip_masking": False,
    "task.d2v2_multi": False,
    "criterion.loss_weights": {},
    "model.transformer.adaptive_input": False,
    "model.transformer.checkpoint_activations": False,
    "model.transformer.no_token_positional_embeddings": False,
    "model.transformer.encoder.layers_to_keep": None,
    "model.transformer.encoder.embed_path": None,
    "model.transformer.encoder.xformers_att_config": None,
}
NAMES = {
    "task._name": ("masked_lm", "image_pretraining"),
    "model._name": ("data2vec_text", "data2vec_vision"),
    "criterion._name": ("model",),
    "optimizer._name": ("adam",),
    "lr_scheduler._name": ("cosine",),
}


def load_config(config_dir: str | Path, config_name: str, overrides: list[str]) -> tuple[DictConfig, list[str]]:
    """Defaults, then the YAML file, then `a.b=c` overrides (Hydra's `+a.b=c` too).

    Returns:
        The configuration, and notes on given keys that have no effect.

    Raises:
        UsageError: no such file, or no YAML; a key unknown to fairseq (the nearest is named), with a value of another
            type or out of its range, or set to what is not supported.
    """
    path = Path(config_dir) / f"{config_name.removesuffix('.yaml')}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in Path(config_dir).glob("*.yaml"))) or "none"
        raise UsageError(f"--config-name {config_name}: {path} does not exist (configurations there: {known})")
    given = OmegaConf.create()
    try:
        given = OmegaConf.load(path)
        if not isinstance(given, DictConfig):
            raise UsageError(f"{path}: it should hold groups of keys, such as 'task:' with 'data:' below it")
        for override in overrides:
            key, equals, _ = override.lstrip("+").partition("=")
            if not equals or not key:
                raise UsageError(f"{override!r}: overrides are written group.key=value")
            given = OmegaConf.merge(given, OmegaConf.from_dotlist([override.lstrip("+")]))
    except (OmegaConfBaseException, yaml.YAMLError, OSError) as error:
        raise UsageError(f"{path}: {_one_line(error)}") from None
    return check_config(given, str(path))


def check_config(given: DictConfig, source: str) -> tuple[DictConfig, list[str]]:
    """Fills in defaults and refuses what would be ignored. `source` names the file in messages."""
    defaults = _defaults(given)
    acted_on = dict(_leaves(defaults))  # with their defaults
    notes = []
    accepted = OmegaConf.create()
    for key, value in _leaves(given):
        if value in (None, {}) and key in defaults:
            continue  # a group whose keys are all commented out
        if _name(key) in NAMES and value not in NAMES[_name(key)]:
            raise UsageError(
                f"{source}: {key}={value}: this program trains {'/'.join(NAMES[_name(key)])} "
                "(is it the configuration of another task?)"
            )
        if key in acted_on:
            OmegaConf.update(accepted, key, value)
        elif key in WITHOUT_EFFECT:
            notes.append(f"{key} has no effect here: {WITHOUT_EFFECT[key]}")
        elif key in ONLY_DEFAULT:
            if value != ONLY_DEFAULT[key]:
                raise UsageError(f"{source}: {key}={value} is not supported, only {ONLY_DEFAULT[key]!r}")
        else:
            raise UsageError(f"{source}: unknown key {key}{_nearest(key, defaults)}")
    config = OmegaConf.merge(defaults, accepted)
    try:
        OmegaConf.resolve(config)  # ${task.tokens_per_sample}
    except OmegaConfBaseException as error:
        raise UsageError(f"{source}: {_one_line(error)}") from None
    _check_values(config, acted_on, source)
    return config, notes


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _defaults(given: DictConfig) -> DictConfig:
    """fairseq's defaults for the task; one that is neither text nor images is refused later, by name."""
    defaults = OmegaConf.load(DEFAULTS)
    if OmegaConf.select(given, "task._name") == "image_pretraining":
        vision = OmegaConf.load(VISION_DEFAULTS)
        defaults.task, defaults.model = vision.task, vision.model
    return defaults


def _name(key: str) -> str:
    return key if key.endswith("._name") else f"{key}._name"


def _leaves(config: Any, prefix: str = "") -> list[tuple[str, Any]]:
    leaves = []
    for key, value in OmegaConf.to_container(config).items():
        name = f"{prefix}{key}"
        if isinstance(value, dict) and value and name not in ONLY_DEFAULT:
            leaves += _leaves(OmegaConf.create(value), f"{name}.")
        else:
            leaves.append((name, value))
    return leaves


def _nearest(key: str, defaults: DictConfig) -> str:
    known = [name for name, _ in _leaves(defaults)] + [*WITHOUT_EFFECT, *ONLY_DEFAULT]
    same_ending = [name for name in known if name.rpartition(".")[2] == key.rpartition(".")[2]]
    nearest = same_ending or difflib.get_close_matches(key, known, 1, 0.5)
    return f"; did you mean {nearest[0]}?" if nearest else ""


def _check_values(config: DictConfig, defaults: dict[str, Any], source: str) -> None:
    def refuse(text: str) -> None:
        raise UsageError(f"{source}: {text}")

    for key, value in _leaves(config):
        OmegaConf.update(config, key, checked_value(key, value, defaults[key], refuse))
    vision = config.task._name == "image_pretraining"
    if vision != (config.model._name == "data2vec_vision"):
        refuse(
            f"task._name={config.task._name} with model._name={config.model._name}: the one is text, the other images"
        )
    if OmegaConf.is_missing(config.task, "data"):
        what = "pictures" if vision else "the binarized corpus"
        refuse(f"task.data is not set: give the folder of {what}, task.data=DIR")
    if config.common.fp16 and config.common.bf16:
        refuse("common.fp16 and common.bf16 are both true: choose one")
    if config.common.log_format not in ("json", None):
        refuse(f"common.log_format={config.common.log_format}: only json is written")
    for key in ("update_freq", "lr"):
        if len(config.optimization[key]) != 1:
            refuse(f"optimization.{key}={list(config.optimization[key])}: one value, not one for each epoch")
    if config.model.ema_steps not in ("per_micro_batch", "per_update"):
        refuse(f"model.ema_steps={config.model.ema_steps}: choose per_micro_batch or per_update")
    if config.model.ema_anneal_end_step is None:
        config.model.ema_anneal_end_step = config.optimization.max_update
    (_check_vision if vision else _check_text)(config, refuse)
    adam_betas(config)


def _check_text(config: DictConfig, refuse: Callable[[str], None]) -> None:
    if not config.task.include_target_tokens:
        refuse("task.include_target_tokens must be true: data2vec needs the masked tokens for its teacher")
    if config.dataset.max_tokens is None and config.dataset.batch_size is None:
        refuse("set dataset.max_tokens or dataset.batch_size")
    longest, positions = config.model.max_positions, config.model.transformer.max_source_positions
    if longest is None:
        longest = config.model.max_positions = config.task.tokens_per_sample
    if longest > positions:
        refuse(
            f"model.max_positions={longest} (by default task.tokens_per_sample) is above the model's "
            f"model.transformer.max_source_positions={positions}: lower the one or raise the other"
        )
    if config.model.transformer.relu_dropout and not config.model.transformer.activation_dropout:
        config.model.transformer.activation_dropout = config.model.transformer.relu_dropout


def _check_vision(config: DictConfig, refuse: Callable[[str], None]) -> None:
    if config.dataset.batch_size is None:
        refuse("dataset.batch_size is not set: images an update and device")
    if config.task.input_size != config.model.image_size:
        refuse(
            f"task.input_size={config.task.input_size} and model.image_size={config.model.image_size}: give both the "
            "same value, the side of the picture that the model sees"
        )
    if config.model.in_channels != 3:
        refuse(f"model.in_channels={config.model.in_channels}: pictures are read as RGB, 3")
    patches = (config.model.image_size // config.model.patch_size) ** 2
    if not 0 < config.model.num_mask_patches < patches:
        refuse(
            f"model.num_mask_patches={config.model.num_mask_patches}: choose 1 to {patches - 1}, of {patches} patches"
        )


def adam_betas(config: DictConfig) -> tuple[float, float]:
    """`optimizer.adam_betas`, which fairseq's YAML files have as a string."""
    value = config.optimizer.adam_betas
    try:
        first, second = map(float, ast.literal_eval(value) if isinstance(value, str) else value)
        if not (0 <= first < 1 and 0 <= second < 1):
            raise ValueError
    except (ValueError, SyntaxError, TypeError):
        raise UsageError(
            f"optimizer.adam_betas={value}: write it as (0.9,0.98), two numbers from 0 to below 1"
        ) from None
    return first, second
