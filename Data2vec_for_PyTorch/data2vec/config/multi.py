"""data2vec 2.0's YAML files: their composite optimizer under the usual keys, and checks of the values."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from omegaconf import DictConfig, OmegaConf

from common.errors import UsageError


def without_groups(given: DictConfig, source: str) -> DictConfig:
    """A composite optimizer's group: its optimizer, schedule and rate, where all configurations have them.

    Several groups are taken where they say the same, as those of large_text_only_task_pgrp_1M do.

    Raises:
        UsageError: groups that differ, or none.
    """
    groups = OmegaConf.select(given, "optimizer.groups")
    if groups is None:
        return given
    merged = OmegaConf.to_container(given)
    groups, *others = merged["optimizer"]["groups"].values() or [None]
    if not isinstance(groups, Mapping) or any(other != groups for other in others):
        raise UsageError(
            f"{source}: optimizer.groups: only one is supported, or several that say the same: all parameters have one "
            "learning rate"
        )
    merged["optimizer"] = dict(groups.get("optimizer") or {})
    merged["lr_scheduler"] = dict(groups.get("lr_scheduler") or {})
    if groups.get("lr_float") is not None:  # which the reference takes before optimization.lr
        merged.setdefault("optimization", {})["lr"] = [groups["lr_float"]]
    return OmegaConf.create(merged)


def without_group(override: str) -> str:
    """An override of the default group, `optimizer.groups.default.optimizer.adam_eps=1e-8`, likewise. UsageError."""
    key, equals, text = override.partition("=")
    plus, groups, rest = key.rpartition("optimizer.groups.")
    if not groups or plus not in ("", "+"):
        return override
    if not rest.startswith("default."):
        raise UsageError(f"{override!r}: only the group 'default' is supported: all parameters have one learning rate")
    rest = rest.removeprefix("default.")
    return f"optimization.lr=[{text}]" if rest == "lr_float" else f"{rest}{equals}{text}"


def refuse_audio(values: Mapping[str, Any], source: str) -> None:
    """UsageError for a configuration of audio, which no part here can train."""
    for group, name in (("model", "supported_modality"), ("task", "_name")):
        value = (values.get(group) or {}).get(name)
        if str(value).lower().startswith("audio"):
            raise UsageError(f"{source}: {group}.{name}={value}: audio is not trained here, only text and pictures")


def check_multi_text(config: DictConfig, refuse: Callable[[str], None]) -> None:
    own, longest = config.model.modalities.text, config.task.tokens_per_sample
    _check_masks(own.mask_prob, longest, "model.modalities.text", "tokens (task.tokens_per_sample)", refuse)
    if config.dataset.max_tokens is None and config.dataset.batch_size is None:
        refuse("set dataset.max_tokens or dataset.batch_size")
    if longest > own.max_source_positions:
        refuse(
            f"task.tokens_per_sample={longest} is above model.modalities.text.max_source_positions="
            f"{own.max_source_positions}: lower the one or raise the other"
        )


def check_multi_vision(config: DictConfig, refuse: Callable[[str], None]) -> None:
    own = config.model.modalities.image
    if config.dataset.batch_size is None:
        refuse("dataset.batch_size is not set: images an update and device")
    if config.task.input_size != own.input_size:
        refuse(
            f"task.input_size={config.task.input_size} and model.modalities.image.input_size={own.input_size}: give "
            "both the same value, the side of the picture that the model sees"
        )
    if own.patch_size > own.input_size:
        refuse(f"model.modalities.image.patch_size={own.patch_size} is above its input_size={own.input_size}")
    if own.embed_dim is None:
        own.embed_dim = config.model.embed_dim
    if own.embed_dim != config.model.embed_dim:
        refuse(f"model.modalities.image.embed_dim={own.embed_dim} is not model.embed_dim={config.model.embed_dim}")
    patches = (own.input_size // own.patch_size) ** 2
    _check_masks(own.mask_prob, patches, "model.modalities.image", "patches", refuse)


def _check_masks(mask_prob: float, count: int, where: str, what: str, refuse: Callable[[str], None]) -> None:
    visible = int(count * (1 - mask_prob))
    if not 0 < visible < count:
        hidden = count - visible
        refuse(f"{where}.mask_prob={mask_prob}: {visible} of {count} {what} would be visible, and {hidden} hidden")
