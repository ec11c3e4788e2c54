"""One short training run of every project on made-up data, for the gates that need a real step but no real result.

A case is an entry script with its arguments. The data are drawn from fixed seeds, need no download and lie in one
folder that several revisions can read: pictures, pairs and a corpus in the formats that users have.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
COUNTED, TIMED, FULL = SIZES = ("counted", "timed", "full")  # milliseconds, half a second on a CPU core, a real model
EPOCHS = "1000"
# On an accelerator a loader must keep up with the device, and epochs be long: both are part of a timed step there.
PICTURES = {COUNTED: 64, TIMED: 64, FULL: 4096}
OVERFLOWS = "1e15"  # a loss scale with which no gradient stays finite
WORKERS = {COUNTED: "0", TIMED: "0", FULL: "8"}
WORDS = "a the red blue green small large dog cat house tree runs sits on under near two three old new".split()


@dataclass(frozen=True)
class Case:
    """One project's run.

    Attributes:
        entry: module of the entry script.
        prepare: writes what the run reads into a folder, for one of SIZES.
        arguments: the entry script's own, for (folder, size); device, precision and output_dir are added.
        variants: more arguments, by name, for what the plain case does not have.
    """

    project: str
    entry: str
    prepare: Callable[[Path, str], None]
    arguments: Callable[[Path, str], list[str]]
    variants: Mapping[str, list[str]] = field(default_factory=dict)

    def command(self, data: Path, size: str, output: Path, device: str, precision: str, *more: str) -> list[str]:
        """The arguments of `main`. A run logs no line of its own accord: reading the loss would be a step's work."""
        common = ["--output_dir", str(output), "--device", device, "--precision", precision, "--case_kind", "perf"]
        logging = [] if "--log_every" in more else ["--log_every", "1000000"]
        return [*self.arguments(data, size), *common, *logging, *more]


def write_pictures(folder: Path, count: int, side: int = 64) -> None:
    """PNGs of noise in two class folders of `folder`/train."""
    generator = np.random.default_rng(0)
    for number in range(count):
        path = folder / "train" / f"class{number % 2}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (side, side, 3), dtype=np.uint8)).save(path)


def sentences(count: int, longest: int) -> list[str]:
    """Random words; every length from 4 to `longest` occurs."""
    generator = np.random.default_rng(0)
    return [" ".join(generator.choice(WORDS, size=4 + number % (longest - 3))) for number in range(count)]


def run_script(project: str, script: str, *arguments: str | Path) -> None:
    """Runs a script of a project in a process of its own."""
    command = [sys.executable, script, *map(str, arguments)]
    result = subprocess.run(command, cwd=ROOT / project, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"{project}/{script} failed:\n{result.stderr[-2000:]}")


# -- ViT ---------------------------------------------------------------------------------------------------------------


def prepare_pictures(folder: Path, size: str) -> None:
    write_pictures(folder, PICTURES[size])


def vit_arguments(folder: Path, size: str) -> list[str]:
    model = {
        COUNTED: ["model.name=vit_demo", "model.img_size=32", "--batch_size", "4"],
        TIMED: ["model.name=vit_small_p16", "model.img_size=112", "--batch_size", "8"],
        FULL: ["model.name=vit_base_p16", "--batch_size", "64"],
    }[size]
    return [
        "--train_dataset_dir", str(folder / "train"), "--do_eval", "false", "--num_workers", WORKERS[size],
        "--epochs", EPOCHS, "--save_every", "1000000", "data.auto_augment=", *model,
    ]  # fmt: skip


# -- BEiT v2 -----------------------------------------------------------------------------------------------------------


def beit2_arguments(folder: Path, size: str) -> list[str]:
    names = {COUNTED: "tiny", TIMED: "small", FULL: "base"}
    tokenizer = "vqkd_encoder_{}_decoder_1x{}_clip"
    tokenizers = {COUNTED: ("tiny", "192x3"), TIMED: ("small", "384x6"), FULL: ("base", "768x12")}
    batch, side, masked = {COUNTED: (2, 64, 6), TIMED: (4, 112, 20), FULL: (64, 224, 75)}[size]
    return [
        "--model", f"beit_{names[size]}_patch16_224_8k_vocab_cls_pt",
        "--tokenizer_model", tokenizer.format(*tokenizers[size]), "--random_tokenizer",
        "--data_path", str(folder / "train"), "--input_size", str(side), "--second_input_size", str(side),
        "--second_interpolation", "bicubic", "--num_mask_patches", str(masked), "--min_mask_patches_per_block", "4",
        "--batch_size", str(batch), "--clip_grad", "3.0", "--num_workers", WORKERS[size], "--epochs", EPOCHS,
        "--no_auto_resume",
    ]  # fmt: skip


# -- CLIP --------------------------------------------------------------------------------------------------------------


def prepare_clip(folder: Path, size: str) -> None:
    write_pictures(folder, PICTURES[size])
    captions = sentences(PICTURES[size], longest=16)
    (folder / "captions.txt").write_text("\n".join(captions))
    pictures = sorted((folder / "train").rglob("*.png"))
    rows = [f"{path.relative_to(folder)},{caption}" for path, caption in zip(pictures, captions, strict=True)]
    (folder / "pairs.csv").write_text("\n".join(["image_path,caption", *rows]) + "\n")
    model = ["--from_scratch", "tiny" if size == COUNTED else "base", *(["--image_size", "64"] * (size == TIMED))]
    run_script(
        "CLIP_for_PyTorch", "save_clip_roberta.py", *model, "--captions", folder / "captions.txt",
        "--output_dir", folder / "clip-roberta",
    )  # fmt: skip


def clip_arguments(folder: Path, size: str) -> list[str]:
    batch = {COUNTED: "4", TIMED: "8", FULL: "64"}[size]
    return [
        "--model_name_or_path", str(folder / "clip-roberta"), "--train_file", str(folder / "pairs.csv"), "--do_train",
        "--per_device_train_batch_size", batch, "--dataloader_num_workers", WORKERS[size], "--dataloader_drop_last",
        "--num_train_epochs", EPOCHS, "--save_every", "0", "--check_images", "False",
        "--overwrite_output_dir",
    ]  # fmt: skip


# -- data2vec ----------------------------------------------------------------------------------------------------------

# tokens a sample, tokens a batch, width, layers, heads
TEXT_SHAPES = {COUNTED: (32, 128, 32, 3, 4), TIMED: (128, 1024, 256, 6, 4), FULL: (512, 8192, 768, 12, 12)}
TEXT_CONFIG = """
task: {{_name: masked_lm, sample_break_mode: none, tokens_per_sample: {tokens}, include_target_tokens: true,
  random_token_prob: 0, leave_unmasked_prob: 0, mask_prob: 0.35, mask_multiple_length: 4}}
criterion: {{_name: model}}
dataset: {{max_tokens: {batch}, num_workers: 0, disable_validation: true}}
optimizer: {{_name: adam, weight_decay: 0.01, adam_betas: "(0.9,0.98)", adam_eps: 1.0e-6}}
lr_scheduler: {{_name: cosine, warmup_updates: 4}}
optimization: {{clip_norm: 5, lr: [0.0005], max_update: 100000}}
checkpoint: {{no_save: true}}
model:
  _name: data2vec_text
  head_layers: 2
  average_top_k_layers: 3
  layer_norm_target_layer: true
  loss_scale: 1
  loss_beta: 4
  ema_decay: 0.999
  ema_end_decay: 0.9999
  ema_anneal_end_step: 10
  transformer:
    dropout: 0.1
    attention_dropout: 0.1
    layernorm_embedding: true
    no_scale_embedding: true
    max_source_positions: {tokens}
    encoder: {{embed_dim: {width}, ffn_embed_dim: {inner}, layers: {layers}, attention_heads: {heads},
      normalize_before: false, learned_pos: true}}
"""


def prepare_data2vec(folder: Path, size: str) -> None:
    tokens, batch, width, layers, heads = TEXT_SHAPES[size]
    shape = {"tokens": tokens, "batch": batch, "width": width, "inner": 4 * width, "layers": layers, "heads": heads}
    (folder / "case.yaml").write_text(TEXT_CONFIG.format(**shape))
    (folder / "text.txt").write_text("\n".join(sentences(24 * batch // 10, longest=16)) + "\n")
    (folder / "valid.txt").write_text("\n".join(sentences(8, longest=16)) + "\n")
    text = ["--only-source", "--trainpref", folder / "text.txt", "--validpref", folder / "valid.txt"]
    run_script("Data2vec_for_PyTorch", "preprocess.py", *text, "--destdir", folder / "corpus", "--workers", "1")


def data2vec_arguments(folder: Path, size: str) -> list[str]:
    config = ["--config-dir", str(folder), "--config-name", "case", f"task.data={folder / 'corpus'}"]
    return [*config, "--resume", "none", "--num_workers", WORKERS[size]]


CASES = {
    case.project: case
    for case in (
        Case(
            "ViT_for_PyTorch", "run_vit", prepare_pictures, vit_arguments,
            {"accumulation": ["accumulate=2"], "fsdp": ["--parallel", "fsdp"], "ema": ["optimizer.ema_decay=0.99"],
             "overflow": ["--loss_scale", OVERFLOWS]},
        ),
        Case(
            "Beit2_for_PyTorch", "run_beitv2_pretraining", prepare_pictures, beit2_arguments,
            {"accumulation": ["--update_freq", "2"], "fsdp": ["--fsdp"], "overflow": ["--loss_scale", OVERFLOWS],
             "compiled": ["--compile"]},
        ),
        Case(
            "CLIP_for_PyTorch", "run_clip", prepare_clip, clip_arguments,
            {"accumulation": ["--gradient_accumulation_steps", "2"], "overflow": ["--loss_scale", OVERFLOWS]},
        ),
        # an update that overflows is no step of its log, and the teacher is an average in every run
        Case(
            "Data2vec_for_PyTorch", "train", prepare_data2vec, data2vec_arguments,
            {"accumulation": ["optimization.update_freq=[2]"], "fsdp": ["--parallel", "fsdp"],
             "compiled": ["--compile"]},
        ),
    )
}  # fmt: skip


def short_names(names: list[str] | None) -> list[str]:
    """Projects by their folder or the part before `_for_PyTorch`, in any case; all of them for None.

    Raises:
        ValueError: an unknown name.
    """
    known = {alias.lower(): name for name in CASES for alias in (name, name.removesuffix("_for_PyTorch"))}
    unknown = [name for name in names or [] if name.lower() not in known]
    if unknown:
        raise ValueError(f"{unknown[0]}: unknown project, choose from {', '.join(CASES)}")
    return [known[name.lower()] for name in names] if names else list(CASES)
