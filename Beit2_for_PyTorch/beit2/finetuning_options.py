"""Options of run_class_finetuning.py and what is built from them."""

from __future__ import annotations

import argparse
import copy
from pathlib import Path
from typing import Any

import torch
from timm.data import Mixup, create_transform
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch import Tensor, nn

from beit2 import options as common_options
from beit2.data.labelled import CentreCrop, CropAndFlip, LabelledImages, TimmTransform, find_classes
from beit2.model.convert import convert_pretrained
from beit2.model.names import FINETUNING_MODELS, create_model
from beit2.model.vision_transformer import VisionTransformer
from beit2.options import (
    add_compile_option,
    add_dead_options,
    add_optimizer_options,
    add_run_options,
    add_schedule_options,
    given_patch_size,
    mean_and_std,
    parse,
)
from beit2.training.optimizers import layer_decay, parameter_groups
from beit2.weights.download import local_file
from beit2.weights.files import read_state_dict
from common.data.posterize_repair import repair_posterize
from common.data.shears import use_fast_shears
from common.errors import UsageError


def read_options(argv: list[str] | None) -> argparse.Namespace:
    """The command line of fine-tuning."""
    parser = argparse.ArgumentParser("run_class_finetuning.py", description="BEiT v2 fine-tuning on image classes")
    parser.add_argument("--batch_size", type=int, default=64, help="per device")
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--save_ckpt_freq", type=int, default=5)
    parser.add_argument("--save_ckpt", action="store_true", default=True)
    parser.add_argument("--no_save_ckpt", action="store_false", dest="save_ckpt")
    _add_model_options(parser)
    _add_augmentation_options(parser)
    add_optimizer_options(parser, lr=5e-4, weight_decay=0.05)
    add_schedule_options(parser, min_lr=1e-6)
    parser.add_argument("--weight_decay_end", type=float, default=None, help="default: --weight_decay")
    parser.add_argument("--layer_decay", type=float, default=0.9)
    parser.add_argument("--disable_weight_decay_on_rel_pos_bias", action="store_true")
    parser.add_argument("--data_path", default="", help="class folders of the training set")
    parser.add_argument("--eval_data_path", default="", help="class folders of the test set")
    parser.add_argument(
        "--data_set", default="image_folder", choices=("image_folder", "IMNET"),
        help="IMNET: --data_path has train/ and val/ with the class folders",
    )  # fmt: skip
    parser.add_argument("--nb_classes", type=int, default=0, help="default: as many as the training set has")
    parser.add_argument("--eval", action="store_true", help="only evaluate --resume")
    parser.add_argument("--dist_eval", action="store_true", default=True, help=argparse.SUPPRESS)
    parser.add_argument("--disable_eval_during_finetuning", action="store_true")
    add_run_options(parser)
    add_compile_option(parser)
    add_dead_options(parser, "enable_deepspeed", "resplit", "load-tar")
    return parse(parser, argv)


def _add_model_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model")
    group.add_argument("--model", default="beit_base_patch16_224")
    group.add_argument("--finetune", default="", help="pretraining checkpoint: file or URL")
    group.add_argument("--model_key", default="model|module")
    group.add_argument("--model_prefix", default="")
    group.add_argument("--model_filter_name", default="", help="any value: load a tokenizer's encoder")
    group.add_argument("--qkv_bias", action="store_true", default=True)
    group.add_argument("--disable_qkv_bias", action="store_false", dest="qkv_bias")
    group.add_argument("--rel_pos_bias", action="store_true", default=True)
    group.add_argument("--disable_rel_pos_bias", action="store_false", dest="rel_pos_bias")
    group.add_argument("--abs_pos_emb", action="store_true", default=False)
    group.add_argument("--layer_scale_init_value", type=float, default=0.1)
    group.add_argument("--input_size", type=int, default=224)
    group.add_argument("--patch_size", type=int, help="default: what the model's name says")
    group.add_argument("--drop", type=float, default=0.0)
    group.add_argument("--attn_drop_rate", type=float, default=0.0)
    group.add_argument("--drop_path", type=float, default=0.1)
    group.add_argument("--init_scale", type=float, default=0.001)
    group.add_argument("--use_mean_pooling", action="store_true", default=True)
    group.add_argument("--use_cls", action="store_false", dest="use_mean_pooling")
    group.add_argument("--model_ema", action="store_true", default=False)
    group.add_argument("--model_ema_decay", type=float, default=0.9999)
    group.add_argument("--model_ema_force_cpu", action="store_true", default=False)


def _add_augmentation_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("augmentation")
    group.add_argument("--imagenet_default_mean_and_std", action="store_true", help="default: mean and std 0.5")
    group.add_argument("--color_jitter", type=float, default=0.4)
    group.add_argument("--aa", default="rand-m9-mstd0.5-inc1", help="RandAugment policy; 'none' = crop and flip only")
    group.add_argument("--smoothing", type=float, default=0.1)
    group.add_argument("--train_interpolation", default="bicubic", choices=("bilinear", "bicubic", "random"))
    group.add_argument("--crop_pct", type=float, default=None)
    group.add_argument("--min_crop_scale", type=float, default=0.08, help="least share of the picture that a crop has")
    group.add_argument("--reprob", type=float, default=0.25)
    group.add_argument("--remode", default="pixel")
    group.add_argument("--recount", type=int, default=1)
    group.add_argument("--mixup", type=float, default=0.0)
    group.add_argument("--cutmix", type=float, default=0.0)
    group.add_argument("--cutmix_minmax", type=float, nargs="+", default=None)
    group.add_argument("--mixup_prob", type=float, default=1.0)
    group.add_argument("--mixup_switch_prob", type=float, default=0.5)
    group.add_argument("--mixup_mode", default="batch", choices=("batch", "pair", "elem"))


def build_datasets(options: argparse.Namespace) -> tuple[LabelledImages, LabelledImages | None, list[str]]:
    """Training set, test set (None without --eval_data_path), class names.

    Raises:
        UsageError: missing folders, or class names that differ.
    """
    if not options.data_path:
        raise UsageError("--data_path is missing: the training set, a folder of class folders")
    folder, eval_folder = options.data_path, options.eval_data_path
    if options.data_set == "IMNET":
        folder, eval_folder = Path(folder, "train"), eval_folder or Path(folder, "val")
    paths, labels, names = find_classes(folder)
    if options.nb_classes and options.nb_classes != len(names):
        raise UsageError(
            f"--nb_classes {options.nb_classes}: {folder} has {len(names)} class folders; give that number"
        )
    training = LabelledImages(paths, labels, _training_transform(options), options.seed)
    return training, _test_set(options, eval_folder, names) if eval_folder else None, names


def _test_set(options: argparse.Namespace, folder: str | Path, names: list[str] | None) -> LabelledImages:
    paths, labels, _ = find_classes(folder, names, "--eval_data_path")
    return LabelledImages(paths, labels, CentreCrop(options.input_size, options.crop_pct))


def build_test_set(
    options: argparse.Namespace, names: list[str] | None, classes: int
) -> tuple[LabelledImages, list[str]]:
    """The test set of an evaluation alone, and the class names.

    Args:
        names: those the checkpoint knows; None: of the training set where there is one, else of the test set itself.
        classes: how many the checkpoint's classifier has.

    Raises:
        UsageError: missing folders, or other classes than the checkpoint's.
    """
    folder, training = options.eval_data_path, options.data_path
    if options.data_set == "IMNET" and training:
        folder, training = folder or Path(training, "val"), Path(training, "train")
    if not folder:
        raise UsageError("--eval needs --eval_data_path DIR, the test set's class folders")
    if names is None:
        has_training = bool(training) and Path(training).is_dir()
        _, _, names = find_classes(training) if has_training else find_classes(folder, None, "--eval_data_path")
    if len(names) != classes:
        raise UsageError(
            f"--eval_data_path {folder}: {len(names)} class folders, the checkpoint has {classes} classes; "
            "where the test set lacks some, give the training set's folder as --data_path"
        )
    return _test_set(options, folder, names), names


# what shapes the model and its pictures: an evaluation takes it from the checkpoint
_OF_THE_CHECKPOINT = """model input_size patch_size crop_pct imagenet_default_mean_and_std qkv_bias rel_pos_bias
    abs_pos_emb layer_scale_init_value use_mean_pooling"""


def checkpoint_to_evaluate(options: argparse.Namespace) -> tuple[Path, dict[str, Any]]:
    """--resume's (or --finetune's), see `options.checkpoint_to_evaluate`."""
    location, advice = options.resume or options.finetune, "--eval needs --resume CHECKPOINT, and --eval_data_path DIR"
    options.finetune = ""
    return common_options.checkpoint_to_evaluate(options, location, _OF_THE_CHECKPOINT, advice)


def weights_to_evaluate(options: argparse.Namespace, checkpoint: dict[str, Any], path: Path) -> dict[str, Tensor]:
    """The weights, or with --model_ema their average.

    Raises:
        UsageError: there is no average, or no classifier.
    """
    state = checkpoint.get("model", checkpoint)
    if options.model_ema and not checkpoint.get("averaged"):  # checkpoint-best.pth has the average alone
        if "model_ema" not in checkpoint:
            raise UsageError(f"{path}: has no weight average; leave out --model_ema to evaluate its weights")
        state = checkpoint["model_ema"]
    if "head.weight" not in state:
        raise UsageError(f"{path}: has no classifier (head.weight); --eval takes a fine-tuned checkpoint")
    return state


def _training_transform(options: argparse.Namespace):
    """timm's recipe, on fp32; or with `--aa none` and no erasing a crop and a flip, as uint8."""
    if options.aa == "none" and options.reprob == 0:
        jitter = options.color_jitter
        return CropAndFlip(options.input_size, options.min_crop_scale, options.train_interpolation, jitter)
    mean, std = mean_and_std(options)
    repair_posterize()
    use_fast_shears()
    try:
        transform = create_transform(
            options.input_size,
            is_training=True,
            scale=(options.min_crop_scale, 1.0),
            color_jitter=options.color_jitter,
            auto_augment=None if options.aa == "none" else options.aa,
            interpolation=options.train_interpolation,
            re_prob=options.reprob,
            re_mode=options.remode,
            re_count=options.recount,
            mean=mean,
            std=std,
        )
    except (AssertionError, ValueError, KeyError) as error:  # timm's own checks
        raise UsageError(
            f"--aa {options.aa} --remode {options.remode}: refused by timm ({error}); "
            "use e.g. --aa rand-m9-mstd0.5-inc1 --remode pixel"
        ) from error
    return TimmTransform(transform)


def build_model(options: argparse.Namespace, classes: int) -> VisionTransformer:
    """The classifier of the options, with the weights of --finetune.

    Raises:
        UsageError: unknown or unfitting model or weights.
    """
    if options.model not in FINETUNING_MODELS:
        raise UsageError(f"--model {options.model}: not a fine-tuning model. Known: {', '.join(FINETUNING_MODELS)}")
    model = create_model(
        options.model,
        img_size=options.input_size,
        num_classes=classes,
        qkv_bias=options.qkv_bias,
        drop_rate=options.drop,
        attn_drop_rate=options.attn_drop_rate,
        drop_path_rate=options.drop_path,
        init_values=options.layer_scale_init_value,
        use_rel_pos_bias=options.rel_pos_bias,
        use_abs_pos_emb=options.abs_pos_emb,
        use_mean_pooling=options.use_mean_pooling,
        init_scale=options.init_scale,
        **given_patch_size(options),
    )
    if options.finetune:
        load_pretrained(model, options)
    return model


def load_pretrained(model: VisionTransformer, options: argparse.Namespace) -> None:
    """Loads --finetune and says what was not loaded.

    Raises:
        UsageError: weights of another width, or hardly any that fit.
    """
    state = read_state_dict(local_file(options.finetune), keys=tuple(options.model_key.split("|")))
    prefix = "encoder." if options.model_filter_name else options.model_prefix
    if prefix:
        state = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
    try:
        state = convert_pretrained(state, model)
        missing, unexpected = model.load_state_dict(state, strict=False)
    except (RuntimeError, ValueError) as error:
        raise UsageError(f"--finetune {options.finetune}: {str(error).splitlines()[-1].strip()}") from error
    blocks = [name for name in missing if name.startswith("blocks.") and "relative_position" not in name]
    if blocks:
        raise UsageError(
            f"--finetune {options.finetune}: {len(blocks)} weights of the blocks are missing, e.g. {blocks[0]}: not a "
            f"checkpoint for --model {options.model} --layer_scale_init_value {options.layer_scale_init_value}"
        )
    fresh = [name for name in missing if not name.endswith("relative_position_index")]
    print(f"{options.finetune}: new in this model: {', '.join(fresh) or 'nothing'}; {len(unexpected)} weights not used")


def finetuning_groups(model: VisionTransformer, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Parameter groups with layer-wise learning rate decay."""
    skip = model.no_weight_decay()
    if options.disable_weight_decay_on_rel_pos_bias:
        skip = skip | {name for name, _ in model.named_parameters() if name.endswith("relative_position_bias_table")}
    if options.layer_decay >= 1:
        return parameter_groups(model, options.weight_decay, skip)
    layer_of, scales = layer_decay(len(model.blocks), options.layer_decay)
    return parameter_groups(model, options.weight_decay, skip, layer_of, scales)


def build_mixup(options: argparse.Namespace, classes: int) -> Mixup | None:
    if options.mixup <= 0 and options.cutmix <= 0 and options.cutmix_minmax is None:
        return None
    if options.cutmix_minmax is not None and len(options.cutmix_minmax) != 2:
        raise UsageError(f"--cutmix_minmax {options.cutmix_minmax}: give two numbers")
    if options.batch_size % 2:
        raise UsageError(f"--batch_size {options.batch_size}: mixup and cutmix pair pictures, give an even number")
    return Mixup(
        mixup_alpha=options.mixup,
        cutmix_alpha=options.cutmix,
        cutmix_minmax=options.cutmix_minmax,
        prob=options.mixup_prob,
        switch_prob=options.mixup_switch_prob,
        mode=options.mixup_mode,
        label_smoothing=options.smoothing,
        num_classes=classes,
    )


def build_criterion(options: argparse.Namespace, mixup: Mixup | None) -> nn.Module:
    """Cross-entropy with the targets of mixup, smoothed ones, or plain ones.

    Raises:
        UsageError: more smoothing than there is.
    """
    if not 0 <= options.smoothing < 1:
        raise UsageError(f"--smoothing {options.smoothing}: must be at least 0 and below 1")
    if mixup is not None:
        return SoftTargetCrossEntropy()
    return LabelSmoothingCrossEntropy(options.smoothing) if options.smoothing > 0 else nn.CrossEntropyLoss()


def build_average(options: argparse.Namespace, model: nn.Module) -> nn.Module | None:
    """The weight average of --model_ema, equal to the model; None without the option."""
    if not options.model_ema:
        return None
    average = copy.deepcopy(model).requires_grad_(False)
    return average.cpu() if options.model_ema_force_cpu else average


@torch.no_grad()
def update_average(average: nn.Module, model: nn.Module, decay: float) -> None:
    """average <- decay average + (1 - decay) model, for every floating-point entry."""
    for ours, theirs in zip(average.state_dict().values(), model.state_dict().values(), strict=True):
        if ours.is_floating_point():
            ours.lerp_(theirs.to(ours.device), 1 - decay)
        else:
            ours.copy_(theirs)
