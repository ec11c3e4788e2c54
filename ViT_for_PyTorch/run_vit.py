"""Trains, fine-tunes, evaluates or predicts with a Vision Transformer.

    python run_vit.py --config configs/run_vit_base_p16_224_100ep.yaml --run_mode finetune \\
        --load_checkpoint mae_vit_base_p16 --train_dataset_dir imageNet-1k/train --eval_dataset_dir imageNet-1k/val
    torchrun --nproc_per_node 8 run_vit.py ...            the same on eight devices
    python run_vit.py --config ... --run_mode eval --load_checkpoint FILE --eval_dataset_dir imageNet-1k/val
    python run_vit.py --config ... --run_mode predict --load_checkpoint FILE --predict_data PICTURE [PICTURE ...]

Any key of the YAML file can be overridden: `optimizer.base_lr=1e-3` or `--optimizer.base_lr 1e-3`.
"""

from __future__ import annotations

import argparse
import sys

from common import apex_options
from common.checkpoint_file import CheckpointError
from common.device import resolve
from common.errors import UsageError, print_usage_errors
from vit import config as configuration
from vit.config import Config
from vit.download import PUBLISHED, DownloadError

RUN_MODES = ("train", "finetune", "eval", "knn", "linear", "predict")
# option of the reference's run_mindformer.py -> key of our configuration
OPTION_KEYS = {
    "device": "device",
    "train_dataset_dir": "data.train_dataset_dir",
    "eval_dataset_dir": "data.eval_dataset_dir",
    "load_checkpoint": "load_checkpoint",
    "resume_training": "resume_training",
    "epochs": "epochs",
    "batch_size": "batch_size",
    "seed": "seed",
    "precision": "precision",
    "loss_scale": "loss_scale",
    "parallel": "parallel",
    "max_steps": "max_steps",
    "save_every": "save_every",
    "log_every": "log_every",
    "num_workers": "data.num_workers",
    "output_dir": "output_dir",
    "case_kind": "case_kind",
    "do_eval": "do_eval",
    "replay": "replay",
    "accept_changes": "accept_changes",
    "profile": "profile",
}
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


def parse(argv: list[str] | None) -> tuple[argparse.Namespace, Config]:
    """The options, and the configuration that they and the overrides make.

    Raises:
        UsageError: an unknown option or key, or a value that does not fit.
    """
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--config", default=None, help="YAML file; without one, MAE's fine-tuning recipe for ViT-B/16")
    parser.add_argument("--run_mode", choices=RUN_MODES, default="train")
    parser.add_argument("--predict_data", nargs="+", default=[], help="pictures or folders of pictures")
    parser.add_argument("--predict_batch_size", type=int, default=32)
    parser.add_argument("--top_k", type=int, default=3, help="predictions a picture")
    parser.add_argument("--device_id", type=int, default=None, help="which device, for one process")
    parser.add_argument("--device_target", choices=["Ascend", "GPU", "CPU"], help="the reference's name for --device")
    parser.add_argument("--options", nargs="+", default=[], metavar="key=value", help="overrides, as in the reference")
    parser.add_argument("--fp16_opt_level", default=None, help="of apex: O0 is fp32, O1 and O2 are fp16")
    parser.add_argument("--amp_backend", choices=apex_options.BACKENDS, default=None, help="native; apex is refused")
    parser.add_argument("--use_combine_grad", action="store_true", help="of apex: accepted, without effect")
    for option in OPTION_KEYS:
        # --do_eval, --profile and --resume_training may stand alone
        alone = {"do_eval": "true", "profile": "true", "resume_training": "auto"}.get(option)
        parser.add_argument(f"--{option}", default=None, **({"nargs": "?", "const": alone} if alone else {}))
    for option, advice in DEAD_OPTIONS.items():
        parser.add_argument(
            f"--{option}", nargs="?", const="", default=None, help=f"accepted, without effect: {advice}"
        )
    options, rest = parser.parse_known_args(argv)

    for option, advice in DEAD_OPTIONS.items():
        if getattr(options, option) is not None:
            print(f"warning: --{option} has no effect: {advice}", file=sys.stderr)
    overrides = options.options + _free_overrides(rest)
    given = {option: getattr(options, option) for option in OPTION_KEYS}
    if given["device"] is None and options.device_target:
        given["device"] = DEVICE_TARGETS[options.device_target.lower()]
    if given["resume_training"] in ("true", "True"):
        given["resume_training"] = "auto"
    elif given["resume_training"] in ("false", "False"):
        given["resume_training"] = ""
    given["precision"] = _precision(options)
    overrides += [f"{OPTION_KEYS[option]}={value}" for option, value in given.items() if value is not None]
    return options, configuration.load(options.config, overrides)


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


def check(options: argparse.Namespace, config: Config) -> None:
    """What each mode cannot do without, said before anything is built."""
    if options.run_mode in ("train", "finetune", "knn", "linear") and not config.data.train_dataset_dir:
        raise UsageError(
            f"--train_dataset_dir is required for {options.run_mode}: a folder with one sub-folder a class"
        )
    if options.run_mode == "finetune" and not (config.load_checkpoint or config.resume_training):
        raise UsageError("--run_mode finetune needs --load_checkpoint: a file, or mae_vit_base_p16 to download it")
    if options.run_mode in ("eval", "knn", "linear") and not config.data.eval_dataset_dir:
        raise UsageError(f"--eval_dataset_dir is required for {options.run_mode}: a folder with one sub-folder a class")
    if options.run_mode in ("eval", "knn", "linear", "predict") and not config.load_checkpoint:
        raise UsageError(f"--load_checkpoint is required for {options.run_mode}: a file, or vit_base_p16")
    if options.run_mode == "predict" and not options.predict_data:
        raise UsageError("--predict_data is required for prediction: pictures, or folders of pictures")
    if options.top_k < 0:
        raise UsageError(f"--top_k {options.top_k}: must be 0 or more")
    if options.predict_batch_size < 1:
        raise UsageError(f"--predict_batch_size {options.predict_batch_size}: must be at least 1")
    if options.run_mode == "train" and not config.load_checkpoint and not config.resume_training:
        print("training from scratch: no --load_checkpoint given (--run_mode finetune insists on one)")


@print_usage_errors
def main(argv: list[str] | None = None, published_weights: bool = False) -> None:
    """Runs what the options say. `published_weights`: evaluate and predict with them where none are given."""
    options, config = parse(argv)
    none_given = options.run_mode in ("eval", "knn", "linear", "predict") and not config.load_checkpoint
    if published_weights and none_given and config.model.name in PUBLISHED:
        config.load_checkpoint = config.model.name
        print(f"--load_checkpoint {config.load_checkpoint}: the published weights, since none were given")
    check(options, config)
    if options.device_id is not None:
        resolve(config.device, options.device_id)
    try:
        run(options, config)
    except (CheckpointError, DownloadError, ValueError) as error:  # a file that does not fit; the message says which
        raise UsageError(str(error)) from error


def run(options: argparse.Namespace, config: Config) -> None:
    from vit import engine, evaluation, prediction

    if options.run_mode in ("train", "finetune"):
        engine.train(config)
    elif options.run_mode in evaluation.METHODS:
        evaluation.evaluate(config, options.run_mode)
    else:
        prediction.predict(config, options.predict_data, options.predict_batch_size, options.top_k)


if __name__ == "__main__":
    main()
