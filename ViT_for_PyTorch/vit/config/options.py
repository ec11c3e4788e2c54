"""The command line of run_vit.py and run_mindformer.py: options in groups, each a key of the configuration."""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass

from common.command_line import apex_options
from common.device import DEVICES, PRECISIONS
from common.errors import UsageError
from vit.config import run_config as configuration
from vit.config.ranges import RANGES
from vit.config.run_config import CHOICES, Config, values_by_key

RUN_MODES = ("train", "finetune", "eval", "knn", "linear", "predict")
DEVICE_TARGETS = {"ascend": "npu", "gpu": "cuda", "cpu": "cpu"}
# options of the reference that mean nothing here, and what to use instead
DEAD_OPTIONS = {
    "mode": "there is no graph mode; model.compile=true compiles the model",
    "use_parallel": "start with torchrun, or bash test/train_full_8p.sh",
    "sink_mode": "batches are always fetched ahead",
    "num_samples": "use max_steps",
    "src_strategy_path_or_dir": "checkpoints do not depend on the number of devices",
    "strategy_load_checkpoint": "checkpoints do not depend on the number of devices",
    "auto_trans_ckpt": "checkpoints do not depend on the number of devices",
    "only_save_strategy": "checkpoints do not depend on the number of devices",
    "remote_save_url": "copy output_dir after the run",
}


@dataclass(frozen=True)
class Option:
    """An option of the reference's run_mindformer.py and the key of our configuration that it sets."""

    key: str
    text: str  # with the unit
    alone: str | None = None  # what it means without a value


GROUPS: dict[str, dict[str, Option]] = {
    "data": {
        "train_dataset_dir": Option("data.train_dataset_dir", "training pictures, FOLDER/<class>/<picture>"),
        "eval_dataset_dir": Option("data.eval_dataset_dir", "evaluation pictures, in the same way"),
        "num_workers": Option("data.num_workers", "processes a rank that read pictures; 0: the run's own"),
    },
    "weights and output": {
        "load_checkpoint": Option(
            "load_checkpoint", "weights: a file, the output folder of a run, or a published name"
        ),
        "resume_training": Option(
            "resume_training",
            "go on: auto (the newest checkpoint of output_dir, if any), or a file; alone: auto",
            "auto",
        ),
        "accept_changes": Option("accept_changes", "what a resumed run may have otherwise: names with commas, or all"),
        "output_dir": Option("output_dir", "folder of results and checkpoints"),
        "save_every": Option("save_every", "optimizer steps between checkpoints; 0: one an epoch"),
    },
    "length and batch": {
        "epochs": Option("epochs", "passes over the training pictures"),
        "max_steps": Option("max_steps", "end after so many optimizer steps; 0: no limit"),
        "batch_size": Option("batch_size", "pictures a device and micro-batch"),
        "seed": Option("seed", "of all randomness"),
        "do_eval": Option("do_eval", "evaluate during training, true or false; alone: true", "true"),
        "log_every": Option("log_every", "optimizer steps between two lines"),
    },
    "device, precision and faults": {
        "device": Option("device", f"one of {', '.join(DEVICES)}"),
        "precision": Option("precision", f"one of {', '.join(PRECISIONS)}"),
        "loss_scale": Option("loss_scale", "of fp16: dynamic, or a constant number"),
        "parallel": Option("parallel", "over ranks: ddp (a replica each) or fsdp (the model in shards)"),
        "profile": Option("profile", "record steps 10 to 12 in output_dir/profile, true or false; alone: true", "true"),
        "replay": Option("replay", "replay.json of a run that stopped: its batch once more, alone"),
        "case_kind": Option("case_kind", "name of the result file: acc or perf"),
    },
}
OPTIONS = {name: option for group in GROUPS.values() for name, option in group.items()}


def parse(argv: list[str] | None, description: str) -> tuple[argparse.Namespace, Config]:
    """The options, and the configuration that they and the overrides make.

    Raises:
        UsageError: an unknown option or key, or a value that does not fit.
    """
    options, rest = parser(description).parse_known_args(argv)
    for option, advice in DEAD_OPTIONS.items():
        if getattr(options, option) is not None:
            print(f"warning: --{option} has no effect: {advice}", file=sys.stderr)
    overrides = options.options + _free_overrides(rest)
    given = {option: getattr(options, option) for option in OPTIONS}
    if given["device"] is None and options.device_target:
        given["device"] = DEVICE_TARGETS[options.device_target.lower()]
    for name, value in given.items():
        if value == "":
            raise UsageError(
                f"--{name} is empty (a variable of the shell that is not set?): give a value or leave it out"
            )
    if given["resume_training"] in ("true", "True"):
        given["resume_training"] = "auto"
    elif given["resume_training"] in ("false", "False"):
        given["resume_training"] = ""
    given["precision"] = _precision(options)
    overrides += [f"{OPTIONS[option].key}={value}" for option, value in given.items() if value is not None]
    return options, configuration.load(options.config, overrides)


def parser(description: str) -> argparse.ArgumentParser:
    """Options by group, the keys of the configuration below them, those without effect last."""
    made = argparse.ArgumentParser(
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        epilog=_keys_text(),
    )
    group = made.add_argument_group("what to do")
    group.add_argument("--config", metavar="FILE", help="YAML file (default: MAE's fine-tuning recipe for ViT-B/16)")
    group.add_argument(
        "--run_mode",
        choices=RUN_MODES,
        default="train",
        help="train: from scratch, or from --load_checkpoint; finetune insists on one; eval scores its classifier, knn "
        "and linear its features; predict names pictures (default: train)",
    )
    group = made.add_argument_group("prediction")
    group.add_argument(
        "--predict_data", nargs="+", default=[], metavar="PATH", help="pictures, folders of them, or URLs"
    )
    group.add_argument("--predict_batch_size", type=int, default=32, metavar="N", help="pictures at once (default: 32)")
    group.add_argument("--top_k", type=int, default=3, metavar="N", help="labels a picture (default: 3)")
    defaults = values_by_key(Config())
    for title, options in GROUPS.items():
        note = "defaults are those without --config" if title == "length and batch" else None
        group = made.add_argument_group(title, note)
        for name, option in options.items():
            default = defaults[option.key]
            shown = "none" if default in ("", None) else str(default).lower() if isinstance(default, bool) else default
            alone = {"nargs": "?", "const": option.alone} if option.alone else {}
            group.add_argument(f"--{name}", metavar="VALUE", help=f"{option.text} (default: {shown})", **alone)
        if title.startswith("device"):
            _add_device_options(group)
    group = made.add_argument_group("any other key")
    group.add_argument(
        "--options", nargs="+", default=[], metavar="KEY=VALUE", help="overrides, as in the reference; see the end"
    )
    group = made.add_argument_group("accepted from MindFormers' command lines, without effect")
    for option, advice in DEAD_OPTIONS.items():
        group.add_argument(f"--{option}", nargs="?", const="", metavar="VALUE", help=advice)
    return made


def _add_device_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--device_id", type=int, metavar="N", help="which device, for one process (default: 0)")
    group.add_argument("--device_target", choices=["Ascend", "GPU", "CPU"], help="the reference's name for --device")
    group.add_argument("--fp16_opt_level", metavar="LEVEL", help="of apex: O0 is fp32, O1 and O2 are fp16")
    group.add_argument("--amp_backend", choices=apex_options.BACKENDS, help="native; apex is refused")
    group.add_argument("--use_combine_grad", action="store_true", help="of apex: accepted, without effect")


def _keys_text() -> str:
    """Every key of the configuration with its default and what it may be."""
    lines = ["all keys, as KEY=VALUE or --KEY VALUE, with their defaults (vit/config/run_config.py says more):"]
    for key, value in values_by_key(Config()).items():
        allowed = f"{RANGES[key]}" if key in RANGES else ", ".join(filter(None, CHOICES.get(key, ())))
        shown = "null" if value is None else str(value).lower() if isinstance(value, bool) else value
        lines.append(f"  {f'{key}={shown}':45} {allowed}".rstrip())
    return "\n".join(lines)


def _precision(options: argparse.Namespace) -> str | None:
    """The precision that --precision and apex's options come to."""
    if options.amp_backend == "apex":
        raise UsageError(
            "--amp_backend apex: apex has no release for this torch; leave it out: --fp16_opt_level means torch's own "
            "mixed precision"
        )
    given = options.fp16_opt_level, options.precision, options.use_combine_grad
    mixed = apex_options.translate(*given)
    for note in mixed.notes:
        print(f"note: {note}", file=sys.stderr)
    return mixed.precision


def _free_overrides(rest: list[str]) -> list[str]:
    """`key.sub=value`, `--key.sub=value` and `--key.sub value` as a list of `key.sub=value`."""
    overrides, words = [], iter(rest)
    for word in words:
        if word.startswith("--") and "=" not in word:
            value = next(words, None)
            if value is None:
                raise UsageError(f"{word}: needs a value, e.g. {word.removeprefix('--')}=VALUE")
            word = f"{word}={value}"
        overrides.append(word.removeprefix("--"))
    return overrides
