"""What a run is of: kept in its checkpoints and compared when one is continued (common/run/run_folder.py)."""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from beit2.data.picture_list import PictureList
from common.distributed import World, broadcast_object

# options that say where, how often and with what a run is done, and not what it computes
_ABOUT_THE_RUN = frozenset(
    "given output_dir log_dir device loss_scale fp16_opt_level amp_backend use_combine_grad max_steps case_kind "
    "profile log_every save_every save_ckpt_freq save_ckpt resume auto_resume start_epoch num_workers pin_mem "
    "accept_changes data_path eval_data_path data_set tokenizer_weight teacher_weight finetune pretrained_weights "
    "batch_size update_freq parallel activation_checkpointing npu_recompute_attention plan_memory precision eval "
    "dist_eval disable_eval calculate_codebook_usage disable_eval_during_finetuning model_ema_force_cpu val_freq "
    "monitor_every monitor_data_path replay compile fp8".split()
)
# changed on purpose: it takes effect from the checkpoint's step on
MAY_CHANGE = (
    "recipe.lr",
    "recipe.min_lr",
    "recipe.base_lr",
    "recipe.epochs",
    "recipe.warmup_epochs",
    "recipe.warmup_steps",
    "recipe.weight_decay",
    "recipe.weight_decay_end",
    "recipe.clip_grad",
)


def run_identity(
    options: argparse.Namespace,
    world: World,
    precision: str,
    paths: PictureList,
    labels: Sequence[int] = (),
    classes: Sequence[str] = (),
    **others: Any,
) -> dict[str, Any]:
    """Data, recipe, precision and pictures a step, as plain values. All ranks call it; the main one looks at the disk.

    Args:
        others: what else it depends on, such as the tokenizer's `tensors_digest`.
    """
    plain = (bool, int, float, str, list, type(None))
    recipe = {k: v for k, v in vars(options).items() if k not in _ABOUT_THE_RUN and isinstance(v, plain)}
    samples = options.batch_size * options.update_freq * world.size
    data = broadcast_object(_data_identity(paths, labels, classes) if world.is_main else None)
    return {"data": data, "recipe": recipe, "precision": precision, "samples_a_step": samples, **others}


def _data_identity(paths: PictureList, labels: Sequence[int], classes: Sequence[str]) -> dict[str, Any]:
    """Count, classes, and a digest of all names and labels and of up to 256 files' sizes. The folder may move."""
    digest = hashlib.sha256(paths.names)
    digest.update(np.asarray(labels, dtype=np.int64).tobytes())
    for index in range(0, len(paths), max(1, -(-len(paths) // 256))):
        digest.update(b"%d\0" % paths.size(index))
    return {"count": len(paths), "classes": list(classes), "digest": digest.hexdigest()[:16]}


def tensors_digest(tensors: Iterable[Tensor]) -> str:
    """A short digest of weights, such as a tokenizer's codebook."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.detach().float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]
