"""Configurations in fairseq's form: a YAML file and dotted overrides, with every key accounted for."""

from __future__ import annotations

import ast
import difflib
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from common.errors import UsageError
from data2vec.config.keys import FULLY_SHARDED, MULTI, REGRESSION_METRICS, Fixed, Ignored, Key, Option, options_of
from data2vec.config.multi import check_multi_text, check_multi_vision, refuse_audio, without_group, without_groups

_LIST_PARTS = re.compile(r"""\s*"[^"]*"|\s*'[^']*'|[^,]+""")  # between commas, or in quotes
PROJECT = Path(__file__).resolve().parents[2]
# what decides a checkpoint's loss, besides task and model, which are taken whole
_EVALUATION_KEYS = ("common.seed", "dataset.max_tokens", "dataset.batch_size", "dataset.required_batch_size_multiple")
_EVALUATION_KEYS += ("dataset.required_seq_len_multiple", "dataset.max_tokens_valid", "dataset.batch_size_valid")
# null in a file, a number in the checkpoint: what another key says
_DERIVED = ("model.max_positions", "model.ema_anneal_end_step", "dataset.max_tokens_valid", "dataset.batch_size_valid")


def load_config(
    config_dir: str | Path, config_name: str, overrides: list[str], stored: Mapping[str, Any] | None = None
) -> tuple[DictConfig, list[str]]:
    """Defaults, then the YAML file, then a checkpoint's own configuration, then `a.b=c` overrides.

    Args:
        overrides: as in Hydra, `+a.b=c` too. A text (a folder, a name) is taken as it is written.
        stored: the checkpoint's, to evaluate it: its task (all but the data's folder) and model replace the file's, its
            seed and batches, too.

    Returns:
        The configuration, and notes on given keys that have no effect, and on what the checkpoint changed.

    Raises:
        UsageError: no such file, or no YAML; a key unknown to fairseq (the nearest is named), with a value of another
            type or out of its range, or set to what is not supported.
    """
    given, path = read_yaml(config_dir, config_name)
    source, notes = str(path), []
    try:
        if stored:
            given, notes = _with_checkpoint(given, stored, path.name)
            source = f"the checkpoint's configuration, {path.name} and overrides"
        given = without_groups(given, source)  # an override of optimization.lr counts
        for override in overrides:
            given = _overridden(given, without_group(override))
    except (OmegaConfBaseException, yaml.YAMLError) as error:
        raise UsageError(f"{source}: {_one_line(error)}") from None
    config, more = check_config(given, source)
    return config, [*more, *notes]


def read_yaml(config_dir: str | Path, config_name: str) -> tuple[DictConfig, Path]:
    """The file as it is, and its path; a folder that is not where the user stands is looked for in this project."""
    folder = Path(config_dir)
    if not folder.is_dir() and (PROJECT / folder).is_dir():
        folder = PROJECT / folder
    path = folder / f"{config_name.removesuffix('.yaml')}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in folder.glob("*.yaml"))) or "none"
        hint = f"configurations there: {known}"
        if "examples/data2vec/config" in str(config_dir):
            here = str(config_dir).partition("examples/data2vec/config")[2].strip("/")
            hint = (
                f"that is a path in fairseq's repository; here it is --config-dir configs/{here or 'text/pretraining'}"
            )
        raise UsageError(f"--config-name {config_name}: {path} does not exist ({hint})")
    try:
        given = OmegaConf.load(path)
    except (OmegaConfBaseException, yaml.YAMLError, OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: {_one_line(error)}") from None
    if not isinstance(given, DictConfig):
        raise UsageError(f"{path}: it should hold groups of keys, such as 'task:' with 'data:' below it")
    return given, path


def checkpoint_path(
    config_dir: str | Path, config_name: str, overrides: list[str], key: str = "common_eval.path"
) -> str | None:
    """`key` of the file, or of the last override that sets it."""
    given, _ = read_yaml(config_dir, config_name)
    for override in overrides:
        if override.lstrip("+").startswith(f"{key}="):
            given = _overridden(given, override)
    return OmegaConf.select(given, key)


def _overridden(given: DictConfig, override: str) -> DictConfig:
    key, equals, text = override.lstrip("+").partition("=")
    if key.startswith(("hydra.", "hydra/")):
        raise UsageError(
            f"{override!r}: Hydra is not used. The run's folder is --output_dir DIR (for hydra.run.dir), and processes "
            "are started by distributed_training.distributed_world_size=N or torchrun"
        )
    if key.startswith("~"):
        raise UsageError(f"{override!r}: keys are not removed here; leave it out of the YAML file, or give its default")
    if not equals or not key:
        raise UsageError(f"{override!r}: write overrides as group.key=value")
    option = _options_of(given).get(key)
    if not isinstance(option, Key) or option.type is not str:
        return OmegaConf.merge(given, OmegaConf.from_dotlist([f"{key}={text}"]))
    given = OmegaConf.merge(given)  # a copy
    if isinstance(option.default, list):
        texts = text[1:-1] if text.startswith("[") and text.endswith("]") else text
        OmegaConf.update(given, key, [_unquoted(p) for part in _LIST_PARTS.findall(texts) if (p := part.strip())])
        return given
    nothing = text == "null" and (option.null or option.default is None)
    OmegaConf.update(given, key, None if nothing else _unquoted(text))
    return given


def _unquoted(text: str) -> str:
    """Without the quotes for Hydra that stand within the shell's."""
    return text[1:-1] if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"" else text


def _with_checkpoint(given: DictConfig, stored: Mapping[str, Any], name: str) -> tuple[DictConfig, list[str]]:
    """The file's configuration with the checkpoint's task, model, seed and batches; a note on what differs."""
    options = _options_of(OmegaConf.create(_plain(stored)))
    before = dict(_leaves(given))
    merged = OmegaConf.to_container(given)
    for group in ("task", "model"):
        if stored.get(group):
            merged[group] = {"data": before["task.data"]} if group == "task" and "task.data" in before else {}
    merged = OmegaConf.create(merged)
    differing = []
    for key, value in _leaves(OmegaConf.create(_plain(stored))):
        option = options.get(key)
        taken = key.startswith(("task.", "model.")) and key != "task.data" or key in _EVALUATION_KEYS
        if not taken or option is None or isinstance(option, Ignored) or isinstance(option, Fixed) and value is None:
            continue
        OmegaConf.update(merged, key, value)
        default = option.default if isinstance(option, Key) else option.value
        if before.get(key, default) != value and (key not in _DERIVED or before.get(key) is not None):
            differing.append(f"{key}={value} ({before.get(key, default)})")
    if not differing:
        return merged, []
    return merged, [f"the checkpoint's own configuration counts; it differs from {name} in {', '.join(differing)}"]


def _plain(value: Any) -> Any:
    """Only plain values: fairseq's checkpoints hold a few others in keys that do not matter here."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return value if isinstance(value, str | int | float | bool | None) else str(value)


def check_config(given: DictConfig, source: str) -> tuple[DictConfig, list[str]]:
    """Fills in defaults and refuses what would be ignored. `source` names the file in messages."""
    options = _options_of(given)
    refuse_audio(given, source)
    config = OmegaConf.create()
    for key, option in options.items():
        if isinstance(option, Key):
            OmegaConf.update(config, key, option.default)
    notes = []
    for key, value in _leaves(given):
        option, name = options.get(key), _name(key)
        if value in (None, {}) and any(other.startswith(f"{key}.") for other in options):
            continue  # a group whose keys are all commented out
        if name in options and value not in options[name].choices:
            raise UsageError(
                f"{source}: {key}={value}: this program trains {'/'.join(options[name].choices)} "
                "(is it the configuration of another task?)"
            )
        if isinstance(option, Key):
            OmegaConf.update(config, key, value)
            if key == "distributed_training.ddp_backend" and value != FULLY_SHARDED:
                notes.append(f"{key}={value}: gradients are reduced in one flat buffer, as legacy_ddp does")
        elif isinstance(option, Ignored):
            notes.append(f"{key} has no effect here: {option.reason}")
        elif isinstance(option, Fixed) and value != option.value:
            raise UsageError(f"{source}: {key}={value} is not supported, only {option.value!r}")
        elif option is None and name not in options:
            raise UsageError(f"{source}: unknown key {key}{_nearest(key, options)}")
    try:
        OmegaConf.resolve(config)  # ${task.tokens_per_sample}
    except OmegaConfBaseException as error:
        raise UsageError(f"{source}: {_one_line(error)}") from None
    _check_values(config, options, source)
    return config, notes


def _options_of(given: DictConfig) -> Mapping[str, Option]:
    """Of the configuration's task and model. UsageError where these are no groups of keys."""
    for group in ("task", "model"):
        if not isinstance(value := given.get(group, {}), DictConfig | dict | None):
            raise UsageError(f"{group}={value}: is a group of keys; write {group}._name={value}")
    return options_of(*(OmegaConf.select(given, f"{group}._name") for group in ("task", "model")))


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _name(key: str) -> str:
    return key if key.endswith("._name") else f"{key}._name"


def _leaves(config: DictConfig) -> Iterator[tuple[str, Any]]:
    """(name with its group, value), interpolations as they are written."""
    yield from _leaves_of(OmegaConf.to_container(config), "")


def _leaves_of(values: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict) and value and name != "criterion.loss_weights":
            yield from _leaves_of(value, f"{name}.")
        else:
            yield name, value


def _nearest(key: str, options: Mapping[str, Option]) -> str:
    same_ending = [name for name in options if name.rpartition(".")[2] == key.rpartition(".")[2]]
    nearest = same_ending or difflib.get_close_matches(key, options, 1, 0.5)
    return f"; did you mean {nearest[0]}?" if nearest else ""


def _check_values(config: DictConfig, options: Mapping[str, Option], source: str) -> None:
    def refuse(text: str) -> None:
        raise UsageError(f"{source}: {text}")

    for key, value in list(_leaves(config)):
        option = options.get(key)
        if isinstance(option, Key):
            OmegaConf.update(config, key, option.checked(key, value, refuse))
    kind, model = config.task._name, config.model._name
    known = {"data2vec_text": ("masked_lm",), "data2vec_vision": ("image_pretraining",)}
    known[MULTI] = ("masked_lm", "mae_image_pretraining")
    if kind not in known.get(model, (kind,)):
        refuse(f"task._name={kind} with model._name={model}: that model is trained by {' or '.join(known[model])}")
    if OmegaConf.is_missing(config.task, "data"):
        what = {"sentence_prediction": "the tables", "masked_lm": "the binarized corpus"}.get(kind, "pictures")
        refuse(f"task.data is not set: give the folder of {what}, task.data=DIR")
    if config.common.fp16 and config.common.bf16:
        refuse("common.fp16 and common.bf16 are both true: choose one")
    if config.common.log_format not in ("json", None):
        refuse(f"common.log_format={config.common.log_format}: only json is written")
    for key in ("update_freq", "lr"):
        if len(config.optimization[key]) != 1:
            refuse(f"optimization.{key}={list(config.optimization[key])}: one value, not one for each epoch")
    if kind != "sentence_prediction" and config.model.ema_anneal_end_step is None:
        config.model.ema_anneal_end_step = config.optimization.max_update
    checks = {"image_pretraining": _check_vision, "sentence_prediction": _check_sentences}
    if model == MULTI:
        checks = {"mae_image_pretraining": check_multi_vision, "masked_lm": check_multi_text}
    checks.get(kind, _check_text)(config, refuse)
    transformer = config.model.get("transformer")
    if transformer and transformer.relu_dropout and not transformer.activation_dropout:
        transformer.activation_dropout = transformer.relu_dropout
    betas = adam_betas(config)
    if not isinstance(config.optimizer.adam_betas, str):  # one spelling, which a resumed run compares
        config.optimizer.adam_betas = "({:g},{:g})".format(*betas)


def _check_text(config: DictConfig, refuse: Callable[[str], None]) -> None:
    if not config.task.include_target_tokens:
        refuse("task.include_target_tokens must be true: data2vec needs the masked tokens for its teacher")
    masks = config.task.leave_unmasked_prob + config.task.random_token_prob < 1
    if not config.task.mask_prob or not masks:
        refuse(
            f"task.mask_prob={config.task.mask_prob}, leave_unmasked_prob={config.task.leave_unmasked_prob}, "
            f"random_token_prob={config.task.random_token_prob}: nothing would become <mask> and be predicted"
        )
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


def _check_sentences(config: DictConfig, refuse: Callable[[str], None]) -> None:
    task, optimization = config.task, config.optimization
    if len(task.columns) not in (1, 2):
        refuse(f"task.columns={list(task.columns)}: name one column of the table, or the two of a pair")
    if task.label_column in task.columns:
        refuse(f"task.label_column={task.label_column}: it is among task.columns, too")
    task.regression_target |= config.criterion.regression_target
    if task.num_classes is not None and task.regression_target != (task.num_classes == 1):
        refuse(
            f"task.num_classes={task.num_classes} with task.regression_target={task.regression_target}: a regression "
            "must have 1 or null, a classification at least 2"
        )
    if task.max_positions > config.model.transformer.max_source_positions:
        task.max_positions = config.model.transformer.max_source_positions
    for key in ("encoder_json", "vocab_bpe", "dict"):
        if task[key] is None:
            refuse(f"task.{key} is not set: give the file with which the pretraining corpus was made, task.{key}=FILE")
    if config.dataset.max_tokens is None and config.dataset.batch_size is None:
        refuse("set dataset.batch_size, in rows, or dataset.max_tokens")
    if not optimization.max_epoch and not optimization.max_update:
        refuse("set optimization.max_epoch or optimization.max_update: the run's length")
    metric, of_regression = config.checkpoint.best_checkpoint_metric, REGRESSION_METRICS
    if metric not in (None, "loss") and task.regression_target != (metric in of_regression):
        refuse(f"checkpoint.best_checkpoint_metric={metric} with task.regression_target={task.regression_target}")


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
    if config.model.patch_size > config.model.image_size:
        refuse(f"model.patch_size={config.model.patch_size} is above model.image_size={config.model.image_size}")
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
