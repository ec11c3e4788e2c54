"""What is trained: the four projects' own scripts, with the settings of small pictures of 32 pixels."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch

from ci.long_proof.sizes import Size, epochs_of_share
from ci.long_proof.stage import Stages
from common.run import result_file

SIDE, PATCH = 32, 4
BEIT2, CLIP, DATA2VEC, VIT = (f"{name}_for_PyTorch" for name in ("Beit2", "CLIP", "Data2vec", "ViT"))
_TOKENIZER = "vqkd_encoder_nano_decoder_1x96x4_dino"
_CODES = {"size": 256, "dim": 16}


def beit2(stages: Stages, data: Path, size: Size) -> dict[str, dict[int, float]]:
    """{start: {share of the labels: top-1}}: pretrained without labels, and from scratch for as many seconds."""
    before = _beit2_pretraining(stages, data, size)
    checkpoint = stages.folder("beit2/pretraining") / "checkpoint.pth"
    starts_from = ["--finetune", checkpoint, "--use_cls"]  # the pretraining's second head taught that token
    pretrained, scratch = {}, {}
    for share in size.shares:
        epochs = epochs_of_share(size.fine_tuning, share)
        pretrained[share], seconds = fine_tune(stages, data, size, "beit2/pretrained", share, epochs, starts_from)
        longer = round(epochs * (before + seconds) / seconds)
        scratch[share], _ = fine_tune(stages, data, size, "beit2/scratch", share, longer)
    return {"BEiT v2": pretrained, "the same from scratch": scratch}


def _beit2_pretraining(stages: Stages, data: Path, size: Size) -> float:
    """The seconds of tokenizer and pretraining."""
    common = [
        "--input_size", SIDE, "--patch_size", PATCH, "--num_workers", _workers(stages), "--log_every", 50,
        "--no_auto_resume", "--seed", 0, "--device", stages.device, "--data_path", data / "train",
    ]  # fmt: skip
    folder = stages.folder("beit2/tokenizer")
    teacher = folder / "teacher.pth"
    seconds = stages.run(
        "beit2/tokenizer",
        BEIT2,
        ["test/pixel_teacher.py", teacher, PATCH, SIDE],
        [
            "run_vqkd_training.py", *common, "--model", _TOKENIZER, "--batch_size", size.batch, "--epochs",
            size.tokenizer, "--disable_eval", "--teacher_weight", teacher, "--codebook_n_emd", _CODES["size"],
            "--codebook_emd_dim", _CODES["dim"], "--quantize_kmeans_init", "--ema_decay", 0.9, "--lr", 2e-3,
            "--warmup_epochs", 0, "--opt_betas", 0.9, 0.99, "--min_crop_scale", 0.4, "--output_dir", folder,
        ],
    )  # fmt: skip
    return seconds + stages.run(
        "beit2/pretraining",
        BEIT2,
        [
            "run_beitv2_pretraining.py", *common, "--model", "beit_nano_patch8_48_8k_vocab_cls_pt", "--batch_size",
            size.batch, "--epochs", size.pretraining, "--early_layers", 3, "--head_layers", 1, "--tokenizer_model",
            _TOKENIZER, "--codebook_size", _CODES["size"], "--codebook_dim", _CODES["dim"], "--tokenizer_weight",
            folder / "checkpoint.pth", "--second_input_size", SIDE, "--second_interpolation", "bicubic",
            "--num_mask_patches", 26, "--min_mask_patches_per_block", 4, "--min_crop_scale", 0.4, "--color_jitter", 0,
            "--drop_path", 0, "--lr", 2e-3, "--warmup_epochs", 0, "--warmup_steps", 50, "--clip_grad", 3.0,
            "--output_dir", stages.folder("beit2/pretraining"),
        ],
    )  # fmt: skip


def fine_tune(
    stages: Stages, data: Path, size: Size, name: str, share: int, epochs: int, starts_from: Sequence[object] = ()
) -> tuple[float, float]:
    """(top-1 in percent of the held-out pictures, seconds) of BEiT v2's classifier."""
    folder = stages.folder(f"{name}-{share}")
    steps = epochs * (size.pictures * share // 100 // size.batch)
    seconds = stages.run(
        f"{name}-{share}",
        BEIT2,
        [
            "run_class_finetuning.py", "--model", "beit_nano_patch8_48", "--input_size", SIDE, "--patch_size", PATCH,
            "--batch_size", size.batch, "--epochs", epochs, "--data_path", data / f"labels-{share}",
            "--eval_data_path", data / "val", "--num_workers", _workers(stages), "--log_every", 50, "--aa", "none",
            "--reprob", 0, "--color_jitter", 0, "--min_crop_scale", 0.4, "--crop_pct", 1, "--layer_decay", 1.0,
            "--drop_path", 0, "--init_scale", 1, "--lr", 1e-3, "--warmup_epochs", 0, "--warmup_steps",
            min(50, steps // 10), "--disable_eval_during_finetuning", "--no_save_ckpt", "--no_auto_resume", "--seed", 0,
            "--device", stages.device, *starts_from, "--output_dir", folder,
        ],
    )  # fmt: skip
    return _accuracy(folder), seconds


def data2vec(stages: Stages, data: Path, size: Size) -> dict[str, dict[int, float]]:
    """As `beit2`. Its encoder has BEiT's shape: BEiT v2's fine-tuning takes it, and those from scratch serve both."""
    folder = stages.folder("data2vec/pretraining")
    updates = size.pretraining * size.pictures // size.batch
    stages.run(
        "data2vec/pretraining",
        DATA2VEC,
        [
            "train.py", "-m", "--config-dir", "configs/vision/pretraining", "--config-name", "demo", "--device",
            stages.device, f"task.data={data}", f"task.input_size={SIDE}", f"model.image_size={SIDE}",
            f"model.patch_size={PATCH}", "model.num_heads=4", "model.num_mask_patches=38",
            "model.max_mask_patches_per_block=38", f"dataset.batch_size={size.batch}",
            f"dataset.num_workers={_workers(stages)}", "dataset.validate_interval=1000",
            f"optimization.max_update={updates}", f"lr_scheduler.warmup_updates={min(50, updates // 4)}",
            "common.seed=1", "--resume", "none", "--output_dir", folder,
        ],
    )  # fmt: skip
    encoder = folder / "encoder.pth"
    torch.save({"model": beit_names(folder / "checkpoints" / "checkpoint_last.pt")}, encoder)
    found = {}
    for share in size.shares:
        epochs = epochs_of_share(size.fine_tuning, share)
        found[share], _ = fine_tune(stages, data, size, "data2vec/pretrained", share, epochs, ["--finetune", encoder])
    return {"data2vec": found}


def beit_names(checkpoint: Path) -> dict[str, torch.Tensor]:
    """The student's encoder of a data2vec checkpoint under BEiT's names."""
    state = torch.load(checkpoint, map_location="cpu", weights_only=True)["model"]
    begins = {"cls_emb": "cls_token", "mask_emb": "mask_token", "patch_embed.conv": "patch_embed.proj", "encoder.": ""}
    renamed = {}
    for name, tensor in state.items():
        for ours, theirs in begins.items():
            if name.startswith(ours):
                new = theirs + name.removeprefix(ours)
                renamed[new.replace(".mlp.0.", ".mlp.fc1.").replace(".mlp.2.", ".mlp.fc2.")] = tensor
    return renamed


def vit(stages: Stages, data: Path, size: Size) -> dict[str, dict[int, float]]:
    """The demo's ViT with its convolutional stem, from scratch."""
    found = {}
    for share in size.shares:
        folder = stages.folder(f"vit/scratch-{share}")
        epochs = epochs_of_share(size.vit, share)
        stages.run(
            f"vit/scratch-{share}",
            VIT,
            [
                "run_vit.py", "--config", "configs/run_vit_demo.yaml", "--run_mode", "train", "--train_dataset_dir",
                data / f"labels-{share}", "--eval_dataset_dir", data / "val", "--epochs", epochs, "--batch_size",
                size.batch, "--device", stages.device, "--output_dir", folder, "--save_every", 1_000_000,
                "--num_workers", _workers(stages), f"eval_every={epochs}", "optimizer.warmup_epochs=0.5",
            ],
        )  # fmt: skip
        found[share] = _accuracy(folder)
    return {"ViT, convolutional stem": found}


def clip(stages: Stages, data: Path, size: Size) -> dict[str, dict[int, float]]:
    """Zero-shot top-1 of a CLIP trained on all pictures with captions that name what they show."""
    start, folder = stages.folder("clip/start"), stages.folder("clip/trained")
    stages.run(
        "clip/start",
        CLIP,
        [
            "save_clip_roberta.py", "--from_scratch", "mini", "--family", "clip", "--captions", data / "train.jsonl",
            "--image_size", SIDE, "--output_dir", start / "model", "--seed", 0,
        ],
    )  # fmt: skip
    stages.run(
        "clip/trained",
        CLIP,
        [
            "run_clip.py", "--model_name_or_path", start / "model", "--train_file", data / "train.jsonl",
            "--validation_file", data / "train.jsonl", "--max_eval_samples", 2 * size.batch, "--zero_shot_dir",
            data / "val", "--templates", data / "templates.txt", "--mask_equal_captions", "--do_train", "--do_eval",
            "--epochs", size.clip, "--batch_size", size.batch, "--per_device_eval_batch_size", size.batch,
            "--dataloader_drop_last", "--num_workers", _workers(stages), "--learning_rate", 1e-3, "--weight_decay", 0.2,
            "--warmup_steps", 50, "--lr_scheduler_type", "cosine", "--log_every", 50, "--save_every", 0, "--seed", 0,
            "--device", stages.device, "--output_dir", folder, "--overwrite_output_dir",
        ],
    )  # fmt: skip
    results = json.loads((folder / "eval_results.json").read_text(encoding="utf-8"))
    return {"CLIP, zero-shot": {100: 100 * results["eval_zero_shot_top1"]}}


CHAINS = (beit2, vit, data2vec, clip)  # the longest first


def _workers(stages: Stages) -> int:
    return 0 if stages.on_cpu else 4


def _accuracy(folder: Path) -> float:
    (result,) = folder.glob("*_acc.log")
    return float(result_file.read(result)["TrainAccuracy"])
