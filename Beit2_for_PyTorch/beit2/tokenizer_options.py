"""Options of run_vqkd_training.py and the tokenizer built from them."""

from __future__ import annotations

import argparse

from beit2 import options
from beit2.model_names import TOKENIZERS, create_tokenizer
from beit2.teachers import load_teacher
from beit2.tokenizer import PROCESS_TYPES, VQKD
from beit2.transforms import INTERPOLATIONS
from beit2.weight_files import local_file
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
    parser.add_argument("--process_type", default="default", choices=PROCESS_TYPES)
    parser.add_argument("--input_size", type=int, default=224)
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
    options.add_amp_backend(parser)
    options.add_dead_options(parser, "teacher_input_size", "weight_decay_end", "imagenet_default_mean_and_std")
    return options.parse(parser, argv)


def build_tokenizer(opts: argparse.Namespace) -> VQKD:
    """The tokenizer with its teacher; the decoder ends in as many values as the teacher's features have."""
    if opts.model not in TOKENIZERS:
        raise UsageError(f"--model {opts.model}: unknown. Known: {', '.join(TOKENIZERS)}")
    if opts.teacher_weight is None:
        raise UsageError(
            "--teacher_weight is missing: a folder of transformers' CLIP, e.g. what `hf download "
            "openai/clip-vit-base-patch16 --local-dir clip` writes, or a DINO ViT file"
        )
    kind = opts.teacher_model_type or ("dino" if opts.model.endswith("dino") else "clip")
    try:
        teacher = load_teacher(local_file(opts.teacher_weight), kind)
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
        )
    except ValueError as error:
        raise UsageError(f"--model {opts.model}, --teacher_weight {opts.teacher_weight}: {error}") from error
