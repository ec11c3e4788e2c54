"""What values a configuration's keys may have: their types, which follow from the defaults, and their limits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

# of keys whose default is null; null is allowed for these and for `or_null`
NULLABLE: dict[str, type] = {
    "common.fp16_scale_window": int,
    "common.threshold_loss_scale": float,
    "common_eval.path": str,
    "dataset.max_tokens": int,
    "dataset.batch_size": int,
    "dataset.max_tokens_valid": int,
    "dataset.batch_size_valid": int,
    "dataset.max_valid_steps": int,
    "checkpoint.finetune_from_model": str,
    "model.loss_scale": float,
    "model.ema_anneal_end_step": int,
    "model.max_positions": int,
}
OR_NULL = ("common.log_format", "task.sample_break_mode", "checkpoint.restore_file", "model.layer_scale_init_value")
SPELLED_FREELY = ("optimizer.adam_betas",)  # a string or a list: read by `config.adam_betas`

COUNT, POSITIVE, SHARE = (0, None), (1, None), (0, 1)
LIMITS: dict[str, tuple[float | None, float | None]] = {
    "common.seed": COUNT,
    "common.log_interval": POSITIVE,
    "common.fp16_scale_window": POSITIVE,
    "common.fp16_scale_tolerance": SHARE,
    "distributed_training.distributed_world_size": POSITIVE,
    "task.tokens_per_sample": (2, None),  # <s> and a token
    "task.mask_prob": SHARE,
    "task.leave_unmasked_prob": SHARE,
    "task.random_token_prob": SHARE,
    "task.mask_multiple_length": POSITIVE,
    "task.mask_stdev": COUNT,
    "dataset.num_workers": COUNT,
    "dataset.max_tokens": POSITIVE,
    "dataset.batch_size": POSITIVE,
    "dataset.max_tokens_valid": POSITIVE,
    "dataset.batch_size_valid": POSITIVE,
    "dataset.max_valid_steps": POSITIVE,
    "dataset.required_batch_size_multiple": POSITIVE,
    "dataset.required_seq_len_multiple": POSITIVE,
    "optimization.max_update": POSITIVE,  # the schedule ends there
    "optimization.update_freq": POSITIVE,
    "optimization.lr": COUNT,
    "optimizer.adam_eps": COUNT,
    "optimizer.weight_decay": COUNT,
    "lr_scheduler.warmup_updates": COUNT,
    "lr_scheduler.t_mult": POSITIVE,
    "model.head_layers": POSITIVE,
    "model.average_top_k_layers": POSITIVE,
    "model.loss_beta": COUNT,
    "model.init_std": (1e-6, None),
    "model.ema_decay": SHARE,
    "model.ema_end_decay": SHARE,
    "model.max_positions": (2, None),
    "model.transformer.dropout": SHARE,
    "model.transformer.attention_dropout": SHARE,
    "model.transformer.activation_dropout": SHARE,
    "model.transformer.relu_dropout": SHARE,
    "model.transformer.encoder.embed_dim": POSITIVE,
    "model.transformer.encoder.ffn_embed_dim": POSITIVE,
    "model.transformer.encoder.layers": POSITIVE,
    "model.transformer.encoder.attention_heads": POSITIVE,
    "model.image_size": POSITIVE,
    "model.patch_size": POSITIVE,
    "model.embed_dim": POSITIVE,
    "model.depth": POSITIVE,
    "model.num_heads": POSITIVE,
    "model.drop_path": SHARE,
    "model.attention_dropout": SHARE,
    "model.min_mask_patches_per_block": POSITIVE,
    "model.max_mask_patches_per_block": POSITIVE,
}
NAMES = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}


def checked_value(key: str, value: Any, default: Any, refuse: Callable[[str], None]) -> Any:
    """The value in its key's type: 1e6 is a whole number, 0 a number, 2024 a folder's name.

    Args:
        key: with its group, "optimization.max_update".
        default: what the key's type is read from; a list's, from its first element.
        refuse: called with what is wrong; raises.
    """
    if value == "???" or key in SPELLED_FREELY or value is None and key in (*NULLABLE, *OR_NULL):
        return value
    if isinstance(default, list):
        values = value if isinstance(value, list) else [value]
        return [checked_value(key, item, default[0], refuse) for item in values]
    kind = NULLABLE.get(key) or type(default)
    wanted = {bool: bool, int: int, float: int | float, str: str | int | float}[kind]
    if kind is int and isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, wanted) or isinstance(value, bool) and kind is not bool:
        refuse(f"{key}={value}: must be {NAMES[kind]}")
    low, high = LIMITS.get(key, (None, None))
    if (low is not None and not value >= low) or (high is not None and not value <= high):  # nan is neither
        refuse(f"{key}={value}: must be {f'{low} to {high}' if high is not None else f'at least {low}'}")
    return str(value) if kind is str else float(value) if kind is float else value
