"""Options of run_vqkd_training.py and the tokenizer built from them."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from torch import nn

from beit2 import options
from beit2.data.labelled import CentreCrop, CropAndFlip, LabelledImages
from beit2.data.listing import list_pictures
from beit2.data.reading import check_images
from beit2.data.transforms import INTERPOLATIONS
from beit2.model.names import TOKENIZERS, create_tokenizer
from beit2.model.teachers import build_teacher, load_teacher
from beit2.model.tokenizer import PROCESS_TYPES, VQKD
from beit2.weights.download import local_file
from common.errors import UsageError


def read_options(argv: list[str] | None) -> argparse.Namespace:
    """The command line of tokenizer training."""
    parser = argparse.ArgumentParser("run_vqkd_training.py", description="VQ-KD tokenizer training")
    parser.add_argument("--batch_size", type=int, default=64, help="per device")
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--save_ckpt_freq", type=int, default=20)
    parser.add_argument("--model", default="vqkd_encoder_base_decoder_3x768x12_clip")
    parser.add_argument("--teacher_weight", default=None, help="CLIP or DINO weights: file, folder or URL")
    parser.add_argument("--teacher_model_type", choices=("clip", "dino"), help="default: what the model's name ends in")
    parser.add_argument("--rec_loss_type", default="cosine", choices=("cosine",))
    parser.add_argument("--codebook_n_emd", type=int, default=8192)
    parser.add_argument("--codebook_emd_dim", type=int, default=32)
    parser.add_argument("--ema_decay", type=float, default=0.99)
    parser.add_argument("--quantize_kmeans_init", action="store_true")
    parser.add_argument(
        "--revive_dead_codes", action="store_true",
        help="after every epoch: codes that nothing used get a place among the next batch's vectors",
    )  # fmt: skip
    parser.add_argument("--process_type", default="default", choices=PROCESS_TYPES)
    parser.add_argument("--input_size", type=int, default=224)
    parser.add_argument("--patch_size", type=int, help="that of the teacher; default: what the model's name stands for")
    parser.add_argument("--data_path", default="", help="image folder")
    parser.add_argument("--eval_data_path", default="", help="image folder")
    parser.add_argument("--data_set", default="image_folder", choices=("image_folder",))
    parser.add_argument("--color_jitter", type=float, default=0.0)
    parser.add_argument("--train_interpolation", default="bicubic", choices=(*INTERPOLATIONS, "random"))
    parser.add_argument("--min_crop_scale", type=float, default=0.08)
    parser.add_argument("--disable_eval", action="store_true")
    parser.add_argument("--eval", action="store_true", help="only evaluate --resume")
    parser.add_argument("--calculate_codebook_usage", action="store_true", help="only count the codes --resume uses")
    parser.add_argument("--dist_eval", action="store_true", default=True, help=argparse.SUPPRESS)
    options.add_optimizer_options(parser, lr=5e-5, weight_decay=1e-4)
    options.add_schedule_options(parser, min_lr=1e-5)
    options.add_run_options(parser)
    options.add_compile_option(parser)
    options.add_dead_options(parser, "teacher_input_size", "weight_decay_end", "imagenet_default_mean_and_std")
    return options.parse(parser, argv)


def build_training_set(opts: argparse.Namespace) -> LabelledImages:
    """The training pictures; their class numbers mean nothing.

    Raises:
        UsageError: no folder, no picture in it, or an unreadable one.
    """
    paths = list_pictures(opts.data_path)
    check_images(paths)
    crop = CropAndFlip(opts.input_size, opts.min_crop_scale, opts.train_interpolation, opts.color_jitter)
    return LabelledImages(paths, [0] * len(paths), crop, opts.seed)


def build_test_set(opts: argparse.Namespace) -> LabelledImages | None:
    """The pictures of the evaluation: of --eval_data_path, or for an evaluation alone else of --data_path.

    Raises:
        UsageError: no folder, no picture in it, or an unreadable one.
    """
    only_evaluates = opts.eval or opts.calculate_codebook_usage
    if not only_evaluates and (opts.disable_eval or not opts.eval_data_path):
        return None
    option = "--data_path" if opts.data_path and not opts.eval_data_path else "--eval_data_path"
    paths = list_pictures(opts.eval_data_path or opts.data_path, option)
    check_images(paths)
    return LabelledImages(paths, [0] * len(paths), CentreCrop(opts.input_size, None, opts.train_interpolation))


# what shapes the tokenizer and its pictures: an evaluation takes it from the checkpoint
_OF_THE_CHECKPOINT = "model input_size patch_size codebook_n_emd codebook_emd_dim process_type teacher_model_type"


def checkpoint_to_evaluate(opts: argparse.Namespace) -> tuple[Path, dict[str, Any]]:
    """--resume's, see `options.checkpoint_to_evaluate`."""
    advice = "--eval and --calculate_codebook_usage need --resume FILE"
    return options.checkpoint_to_evaluate(opts, opts.resume, _OF_THE_CHECKPOINT, advice)


def find_teacher(opts: argparse.Namespace, checkpoint: dict[str, Any] | None = None, path: Path | None = None):
    """The frozen teacher of --teacher_weight; for an evaluation alone the one in the checkpoint.

    Raises:
        UsageError: no teacher, or unusable weights.
    """
    if opts.teacher_weight is None and checkpoint is not None and "teacher" in checkpoint:
        return build_teacher(checkpoint["teacher"])  # its weights are among the checkpoint's
    if opts.teacher_weight is None:
        where = "" if path is None else f" and {path} does not say what its teacher was"
        raise UsageError(
            f"--teacher_weight is missing{where}: a folder of transformers' CLIP, e.g. what `hf download "
            "openai/clip-vit-base-patch16 --local-dir clip` writes, or a DINO ViT file"
        )
    _check_name(opts)
    kind = opts.teacher_model_type or ("dino" if opts.model.endswith("dino") else "clip")
    try:
        return load_teacher(local_file(opts.teacher_weight), kind)
    except ValueError as error:
        raise UsageError(f"--model {opts.model}, --teacher_weight {opts.teacher_weight}: {error}") from error


def build_tokenizer(opts: argparse.Namespace, teacher: nn.Module) -> VQKD:
    """The tokenizer with its teacher; the decoder ends in as many values as the teacher's features have."""
    _check_name(opts)
    try:
        return create_tokenizer(
            opts.model,
            teacher=teacher,
            img_size=opts.input_size,
            n_code=opts.codebook_n_emd,
            code_dim=opts.codebook_emd_dim,
            decay=opts.ema_decay,
            kmeans_init=opts.quantize_kmeans_init,
            process_type=opts.process_type,
            decoder_out_dim=teacher.output_dim,
            **options.given_patch_size(opts),
        )
    except ValueError as error:
        raise UsageError(f"--model {opts.model}, --teacher_weight {opts.teacher_weight}: {error}") from error


def _check_name(opts: argparse.Namespace) -> None:
    if opts.model not in TOKENIZERS:
        raise UsageError(f"--model {opts.model}: unknown. Known: {', '.join(TOKENIZERS)}")
