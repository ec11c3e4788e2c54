"""What a run is of: what decides what its steps compute, for a checkpoint and for whoever goes on from it."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from transformers import PreTrainedModel

from clip_pretraining.options.arguments import ClipTrainingArguments, DataArguments
from clip_pretraining.training.pipeline import Setup
from common.distributed import World


def facts(setup: Setup, data: DataArguments, args: ClipTrainingArguments, world: World, steps: int) -> dict[str, Any]:
    """Plain values by name. Those of `schedule` and `ranks` may change on purpose (resume.MAY_CHANGE).

    The number of ranks does not matter as long as the global batch stays.
    """
    return {
        "data": setup.train_identity,
        "max_seq_length": setup.collate.max_length,
        "clean_captions": data.clean_captions,
        "random_crop": data.random_crop,
        "global_batch": args.per_device_train_batch_size * world.size,
        "drop_last": args.dataloader_drop_last,
        "seed": args.seed,
        "data_seed": args.data_seed,
        "model": _digest(_architecture(setup.model.config.to_dict())),
        "tokenizer": _digest(setup.tokenizer.get_vocab()),
        "frozen": frozen_parts(setup.model),
        "lora": [args.lora_rank, args.lora_scale] if args.lora_rank else [],
        "keep_patches": args.keep_patches,
        "ema_decay": args.ema_decay,
        "loss": args.loss,
        "contrastive_scope": args.contrastive_scope,
        "mask_equal_captions": args.mask_equal_captions,
        "distinct_pairs": args.distinct_pairs,
        "with_replacement": args.with_replacement,
        "source_weights": args.source_weights,
        "clamp_logit_scale": args.clamp_logit_scale,
        "precision": args.precision,
        "optim": args.optim.removesuffix("_fused"),
        "schedule": {
            "steps": steps,
            "learning_rate": args.learning_rate,
            "lr_scheduler_type": str(args.lr_scheduler_type),
            "warmup_steps": args.warmup_steps,
            "weight_decay": args.weight_decay,
            "max_grad_norm": args.max_grad_norm,
            "adam": [args.adam_beta1, args.adam_beta2, args.adam_epsilon],
        },
        "ranks": world.size,
    }


def frozen_parts(model: PreTrainedModel) -> list[str]:
    """Names of the parts that are not trained: an optimizer's state belongs to those that are."""
    return [name for name, part in model.named_children() if not any(p.requires_grad for p in part.parameters())]


def _architecture(config: dict[str, Any]) -> dict[str, Any]:
    """A model's configuration without where it came from and who wrote it."""
    about = ("_name_or_path", "transformers_version", "architectures", "dtype", "torch_dtype")
    parts = {key: value for key, value in config.items() if key not in about}
    return {key: _architecture(value) if isinstance(value, dict) else value for key, value in parts.items()}


def _digest(values: Any) -> str:
    return hashlib.blake2b(json.dumps(values, sort_keys=True, default=str).encode(), digest_size=8).hexdigest()
