"""Trains, fine-tunes, evaluates or predicts with a Vision Transformer.

    python run_vit.py --config configs/run_vit_base_p16_224_100ep.yaml --run_mode finetune \\
        --load_checkpoint mae_vit_base_p16 --train_dataset_dir imageNet-1k/train --eval_dataset_dir imageNet-1k/val
    torchrun --nproc_per_node 8 run_vit.py ...            the same on eight devices
    python run_vit.py --config ... --run_mode eval --load_checkpoint FILE --eval_dataset_dir imageNet-1k/val
    python run_vit.py --run_mode knn --load_checkpoint FILE --train_dataset_dir DIR --eval_dataset_dir DIR  (or linear)
    python run_vit.py --config ... --run_mode predict --load_checkpoint FILE --predict_data PICTURE [PICTURE ...]

Any key of the YAML file can be overridden: `optimizer.base_lr=1e-3` or `--optimizer.base_lr 1e-3`.
"""

from __future__ import annotations

import common.requirements

import argparse

from common.checkpoint_file import CheckpointError
from common.device import resolve
from common.errors import UsageError, print_usage_errors
from vit.config.options import parse
from vit.config.run_config import Config
from vit.weights.download import PUBLISHED, DownloadError


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
def main(argv: list[str] | None = None, published_weights: bool = False, description: str | None = None) -> None:
    """Runs what the options say. `published_weights`: evaluate and predict with them where none are given."""
    options, config = parse(argv, description or __doc__)
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
