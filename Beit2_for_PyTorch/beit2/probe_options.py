"""Options of run_linear_eval.py and what is built from them."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from beit2 import options as common_options
from beit2.data.labelled import CentreCrop, CropAndFlip, LabelledImages, find_classes
from beit2.data.reading import check_images
from beit2.model.names import FINETUNING_MODELS, create_model
from beit2.model.vision_transformer import VisionTransformer
from beit2.options import add_optimizer_options, add_run_options, given_patch_size, parse, truth
from beit2.weights.download import local_file
from beit2.weights.files import read_state_dict
from common.errors import UsageError


def read_options(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("run_linear_eval.py", description="linear probe of a BEiT v2 encoder")
    parser.add_argument("--batch_size", "--batch_size_per_gpu", type=int, default=128, help="per device")
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--model", default="beit_base_patch16_224")
    parser.add_argument("--pretrained_weights", default="", help="pretraining checkpoint: file or URL")
    parser.add_argument("--checkpoint_key", default="model|module|teacher")
    parser.add_argument("--input_size", type=int, default=224)
    parser.add_argument("--patch_size", type=int, help="default: what the model's name says")
    parser.add_argument("--layer_scale_init_value", type=float, default=0.1)
    parser.add_argument("--abs_pos_emb", action="store_true")
    parser.add_argument("--rel_pos_bias", action="store_true", default=True)
    parser.add_argument("--disable_rel_pos_bias", action="store_false", dest="rel_pos_bias")
    parser.add_argument("--data_path", default="", help="class folders of the training set, or train/ and val/ of them")
    parser.add_argument("--eval_data_path", default="", help="class folders of the test set; default: DATA_PATH/val")
    parser.add_argument("--num_labels", type=int, default=0, help="default: as many as the training set has")
    parser.add_argument(
        "--imagenet_default_mean_and_std", type=truth, nargs="?", const=True, default=False,
        help="default: mean and std 0.5",
    )  # fmt: skip
    parser.add_argument("--avgpool_patchtokens", type=truth, default=True, help="features beside CLS; must be True")
    parser.add_argument("--amp_forward", type=truth, default=True, help="False: the encoder in fp32")
    parser.add_argument("--base_lr", type=float, default=0.001, help="times batch / 256, when --lr is 0")
    parser.add_argument("--val_freq", type=int, default=1, help="epochs between two evaluations")
    parser.add_argument("--eval", action="store_true", help="only evaluate --resume, a checkpoint of a probe")
    add_optimizer_options(parser, lr=0.0, weight_decay=1e-4)  # the rate falls to 0 in a cosine, by epoch
    parser.add_argument("--optimizer", dest="opt", default=argparse.SUPPRESS, help="the same as --opt")
    add_run_options(parser)
    parser.set_defaults(update_freq=1)
    options = parse(parser, argv)
    if not options.avgpool_patchtokens:
        raise UsageError("--avgpool_patchtokens False: leave it out, the probe's features are CLS and the mean patch")
    if options.val_freq < 1:
        raise UsageError(f"--val_freq {options.val_freq}: must be at least 1")
    return options


def load_encoder(options: argparse.Namespace) -> VisionTransformer:
    """The frozen encoder with the shared bias it was pretrained with.

    Raises:
        UsageError: no weights, or weights of another encoder.
    """
    if options.model not in FINETUNING_MODELS:
        raise UsageError(f"--model {options.model}: unknown. Known: {', '.join(FINETUNING_MODELS)}")
    if not options.pretrained_weights:
        raise UsageError("--pretrained_weights is missing: a pretraining checkpoint")
    encoder = create_model(
        options.model, img_size=options.input_size, num_classes=0, use_rel_pos_bias=False, use_mean_pooling=False,
        use_shared_rel_pos_bias=options.rel_pos_bias, use_abs_pos_emb=options.abs_pos_emb,
        init_values=options.layer_scale_init_value, **given_patch_size(options),
    )  # fmt: skip
    path = local_file(options.pretrained_weights)
    state = read_state_dict(path, keys=tuple(options.checkpoint_key.split("|")))
    try:
        missing, _ = encoder.load_state_dict(state, strict=False)
    except RuntimeError as error:
        raise UsageError(f"{path}: {str(error).splitlines()[-1].strip()}") from error
    if missing:
        raise UsageError(f"{path}: not a checkpoint for --model {options.model}, it has no {missing[0]}")
    return encoder.requires_grad_(False).eval()


def build_datasets(options: argparse.Namespace) -> tuple[LabelledImages, LabelledImages, list[str]]:
    """Training set, test set, class names.

    Raises:
        UsageError: a folder that is missing, or an unreadable picture.
    """
    if not options.data_path:
        raise UsageError("--data_path is missing: a folder with train/ and val/, or the training set's class folders")
    folder = Path(options.data_path) if options.eval_data_path else Path(options.data_path, "train")
    paths, labels, names = find_classes(folder)
    if options.num_labels not in (0, len(names)):
        raise UsageError(
            f"--num_labels {options.num_labels}: {folder} has {len(names)} class folders; give that number"
        )
    training = LabelledImages(paths, labels, CropAndFlip(options.input_size, 0.08, "bilinear"), options.seed)
    test, _ = build_test_set(options, names, paths)
    return training, test, names


def build_test_set(
    options: argparse.Namespace, names: list[str] | None, others: Sequence[str | Path] = ()
) -> tuple[LabelledImages, list[str]]:
    """Test set and class names; by default (None) those of the test set itself. `others` are looked at with it.

    Raises:
        UsageError: a folder that is missing, an unknown class, or an unreadable picture.
    """
    if not (options.eval_data_path or options.data_path):
        raise UsageError("--eval_data_path is missing: the test set's class folders")
    paths, labels, names = find_classes(
        options.eval_data_path or Path(options.data_path, "val"), names, "--eval_data_path"
    )
    check_images(others, paths)
    return LabelledImages(paths, labels, CentreCrop(options.input_size)), names


# what shapes the encoder and its pictures: an evaluation takes it from the checkpoint
_OF_THE_CHECKPOINT = """model input_size patch_size imagenet_default_mean_and_std rel_pos_bias abs_pos_emb
    layer_scale_init_value pretrained_weights checkpoint_key"""


def checkpoint_to_evaluate(options: argparse.Namespace) -> tuple[Path, dict[str, Any]]:
    """--resume's, see `options.checkpoint_to_evaluate`."""
    advice = "--eval needs --resume CHECKPOINT of a probe, and --eval_data_path DIR"
    return common_options.checkpoint_to_evaluate(options, options.resume, _OF_THE_CHECKPOINT, advice)
