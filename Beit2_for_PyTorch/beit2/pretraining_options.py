"""Options of run_beitv2_pretraining.py and what is built from them."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from beit2.data.images import PretrainingImages
from beit2.data.listing import list_pictures
from beit2.data.masking import MaskingGenerator
from beit2.data.reading import check_images
from beit2.data.transforms import INTERPOLATIONS, TwoViewTransform
from beit2.model.masked_image_model import MaskedImageModel
from beit2.model.names import FINETUNING_MODELS, create_model, create_tokenizer
from beit2.model.tokenizer import VQKD, load_tokenizer_weights
from beit2.model.tokenizer_file import patch_of
from beit2.options import (
    add_compile_option,
    add_dead_options,
    add_optimizer_options,
    add_run_options,
    add_schedule_options,
    given_patch_size,
    parse,
    truth,
)
from beit2.weights.download import find_tokenizer, local_file
from beit2.weights.files import saved_options
from beit2.weights.published import TOKENIZERS as PUBLISHED_TOKENIZERS
from common.errors import UsageError

_AUTOCAST = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def read_options(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line of pretraining.

    Raises:
        UsageError: values that cannot work.
    """
    parser = argparse.ArgumentParser("run_beitv2_pretraining.py", description="BEiT v2 pretraining")
    parser.add_argument("--batch_size", type=int, default=64, help="per device")
    parser.add_argument("--epochs", type=int, default=300)
    parser.add_argument("--save_ckpt_freq", type=int, default=20, help="epochs between two checkpoint-<epoch>.pth")
    _add_model_options(parser)
    _add_data_options(parser)
    add_optimizer_options(parser, lr=5e-4, weight_decay=0.05)
    add_schedule_options(parser, min_lr=1e-5)
    parser.add_argument("--weight_decay_end", type=float, default=None, help="default: --weight_decay")
    add_run_options(parser)
    add_compile_option(parser)
    parser.add_argument("--fp8", action="store_true", help="the blocks' linear layers multiply in 8 bits; with bf16")
    add_dead_options(parser, "decoupling_aug", "eval_data_path")
    parser.add_argument(
        "--parallel", choices=("ddp", "fsdp"), default="ddp",
        help="fsdp: shard parameters, gradients and optimizer over the ranks (FSDP2)",
    )  # fmt: skip
    parser.add_argument("--fsdp", action="store_const", const="fsdp", dest="parallel", help="the same")
    parser.add_argument("--activation_checkpointing", action="store_true", help="recompute blocks in backward")
    parser.add_argument(
        "--npu_recompute_attention", action="store_true",
        help="npu: fused attention for the trained relative position bias, too. The kernel has no gradient for a bias, "
        "so backward recomputes plain attention: less memory, more work; by default such attention is plain",
    )  # fmt: skip
    parser.add_argument("--plan_memory", type=int, nargs="?", const=8, metavar="RANKS", help="print memory and stop")
    options = parse(parser, argv)
    if options.compile and options.fp8:
        raise UsageError("--fp8: not with --compile, with which it was not tried; leave one out")
    if options.compile and options.parallel == "fsdp":
        raise UsageError(
            "--compile: not with --parallel fsdp, which gathers parameters inside the blocks; leave one out"
        )
    return options


def _add_model_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model and tokenizer")
    group.add_argument("--model", default="beit_base_patch16_224_8k_vocab")
    group.add_argument("--tokenizer_model", default="vqkd_encoder_base_decoder_3x768x12_clip")
    group.add_argument("--tokenizer_weight", default=None, help="file, address, or the name of a published one")
    group.add_argument("--random_tokenizer", action="store_true", help="for speed measurements: no weights")
    group.add_argument("--rel_pos_bias", action="store_true", default=True)
    group.add_argument("--disable_rel_pos_bias", action="store_false", dest="rel_pos_bias")
    group.add_argument("--abs_pos_emb", action="store_true", default=False)
    group.add_argument("--layer_scale_init_value", type=float, default=0.1, help="1e-5 for large; 0 = no layer scale")
    group.add_argument("--num_mask_patches", type=int, default=75)
    group.add_argument("--max_mask_patches_per_block", type=int, default=None)
    group.add_argument("--min_mask_patches_per_block", type=int, default=16)
    group.add_argument("--input_size", type=int, default=224)
    group.add_argument("--patch_size", type=int, help="default: what the model's name says")
    group.add_argument("--second_input_size", type=int, default=224, help="of the tokenizer's pictures")
    group.add_argument("--drop_path", type=float, default=0.1)
    group.add_argument("--early_layers", type=int, default=9)
    group.add_argument("--head_layers", type=int, default=2)
    group.add_argument("--shared_lm_head", type=truth, default=True)
    group.add_argument("--init_cls_pt_layers", action="store_true", help="initialise the head as the rest")
    group.add_argument("--codebook_size", type=int, default=8192)
    group.add_argument("--codebook_dim", type=int, default=32)


def _add_data_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("data")
    group.add_argument("--data_path", default="", help="image folder, or COCO 2017's")
    group.add_argument("--data_set", default="image_folder", choices=("image_folder",))
    group.add_argument("--color_jitter", type=float, default=0.4)
    group.add_argument("--train_interpolation", default="bicubic", choices=(*INTERPOLATIONS, "random"))
    group.add_argument("--second_interpolation", default="lanczos", choices=tuple(INTERPOLATIONS))
    group.add_argument("--min_crop_scale", type=float, default=0.08)
    group.add_argument("--imagenet_default_mean_and_std", action="store_true", help="default: mean and std 0.5")
    group.add_argument(
        "--monitor_every", type=int, default=0, metavar="EPOCHS",
        help="score the frozen encoder by k-NN and a linear classifier, at the start, every so many epochs, at the end",
    )  # fmt: skip
    group.add_argument(
        "--monitor_data_path", default="", metavar="DIR",
        help="its pictures, DIR/train/<class>/ and DIR/val/<class>/; default: DATA_PATH, or what it lies in",
    )  # fmt: skip


def build_model(options: argparse.Namespace) -> MaskedImageModel:
    """The model of the options, at `--input_size`.

    Raises:
        UsageError: values the model refuses.
    """
    overrides = {
        "img_size": options.input_size,
        "vocab_size": options.codebook_size,
        "drop_path_rate": options.drop_path,
        "init_values": options.layer_scale_init_value,
        "use_abs_pos_emb": options.abs_pos_emb,
        "use_shared_rel_pos_bias": options.rel_pos_bias,
        **given_patch_size(options),
    }
    if options.model.endswith("cls_pt"):
        overrides |= {
            "early_layers": options.early_layers,
            "head_layers": options.head_layers,
            "shared_lm_head": options.shared_lm_head,
            "init_cls_pt_layers": options.init_cls_pt_layers,
        }
    if options.model in FINETUNING_MODELS:
        raise UsageError(f"--model {options.model} is for fine-tuning; for pretraining add _8k_vocab[_cls_pt]")
    try:
        return create_model(options.model, **overrides)
    except ValueError as error:
        raise UsageError(f"--model {options.model}: {error}") from error


def load_tokenizer(options: argparse.Namespace, precision: str, window: tuple[int, int]) -> VQKD:
    """The frozen tokenizer for a model that cuts its pictures into a grid of `window` patches.

    Raises:
        UsageError: another grid, no weights and none to be fetched, or weights of another tokenizer.
    """
    if options.random_tokenizer and options.tokenizer_weight:
        raise UsageError("--random_tokenizer and --tokenizer_weight: give one of the two")
    path = None if options.random_tokenizer else _tokenizer_file(options)
    patch = given_patch_size(options).get("patch_size") if path is None else patch_of(path)
    tokenizer = create_tokenizer(
        options.tokenizer_model,
        img_size=options.second_input_size,
        **({} if patch is None else {"patch_size": patch}),
        n_code=options.codebook_size,
        code_dim=options.codebook_dim,
        process_type=getattr(saved_options(path), "process_type", "default"),  # as it was trained
    ).for_encoding(_AUTOCAST[precision])
    _check_windows(options, window, tokenizer)
    if path is not None:
        load_tokenizer_weights(tokenizer, path)
    return tokenizer


def _tokenizer_file(options: argparse.Namespace) -> Path:
    """--tokenizer_weight; else what `tokenizer_model/` has here or in the project; else the published file."""
    if options.tokenizer_weight:
        return local_file(options.tokenizer_weight)
    found = find_tokenizer(options.tokenizer_model, (Path.cwd(), Path(__file__).resolve().parents[1]))
    if found is not None:
        print(f"tokenizer: {found}", flush=True)
        return found
    if options.tokenizer_model not in PUBLISHED_TOKENIZERS:
        raise UsageError(
            f"--tokenizer_weight is missing, and nobody publishes {options.tokenizer_model}: train one with "
            "run_vqkd_training.py"
        )
    return local_file(options.tokenizer_model)


def _check_windows(options: argparse.Namespace, window: tuple[int, int], tokenizer: VQKD) -> None:
    """Model and tokenizer must cut their pictures into the same grid.

    Raises:
        UsageError: they do not.
    """
    if tuple(tokenizer.window_size) != tuple(window):
        side = window[0] * tokenizer.encoder.patch_size[0]
        raise UsageError(
            f"--second_input_size {options.second_input_size} gives the tokenizer {tokenizer.window_size} patches, the "
            f"model has {tuple(window)} at --input_size {options.input_size}: give --second_input_size {side}"
        )


def build_dataset(options: argparse.Namespace, window: tuple[int, int]) -> PretrainingImages:
    """The pictures with their augmentation and masks.

    Raises:
        UsageError: no pictures, an unreadable one, or more patches to mask than there are.
    """
    if not options.data_path:
        raise UsageError("--data_path is missing: a folder of pictures")
    transform = TwoViewTransform(
        options.input_size,
        options.second_input_size,
        options.train_interpolation,
        options.second_interpolation,
        options.min_crop_scale,
        options.color_jitter,
    )
    try:
        masking = MaskingGenerator(
            window, options.num_mask_patches, options.min_mask_patches_per_block, options.max_mask_patches_per_block
        )
    except ValueError as error:
        raise UsageError(str(error)) from error
    paths = list_pictures(options.data_path)
    check_images(paths)
    return PretrainingImages(paths, transform, masking, options.seed)
