"""Text checkpoints as fairseq and Meta published them over the years, under today's names (`upgrade_state_dict`)."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from torch import Tensor

# parts that pretraining does not have: RoBERTa's language-model head, heads of fine-tuning, a teacher of an old release
_LEFT_OUT = ("encoder.lm_head.", "classification_heads.", "encoder.target_model.")
_RENAMED = {
    ".emb_layer_norm.": ".layernorm_embedding.",
    ".layer_norms.0.": ".self_attn_layer_norm.",
    ".layer_norms.1.": ".final_layer_norm.",
}


def to_todays_names(state: Mapping[str, Tensor], kept: Collection[str] = ()) -> tuple[dict[str, Tensor], list[str]]:
    """(weights under today's names, beginnings of those that were left out, which are none of the names `kept`)."""
    result, left_out = {}, set()
    for name, value in state.items():
        if name.startswith("decoder."):
            name = "encoder." + name.removeprefix("decoder.")
        beginning = next((part for part in _LEFT_OUT if name.startswith(part)), None)
        if beginning and name not in kept:
            left_out.add(beginning.rstrip("."))
            continue
        for old, new in _RENAMED.items():
            name = name.replace(old, new)
        module, _, kind = name.rpartition("in_proj_")
        if module and kind in ("weight", "bias"):  # query, key and value in one
            for letter, part in zip("qkv", value.chunk(3), strict=True):
                result[f"{module}{letter}_proj.{kind}"] = part
        else:
            result[name] = value
    return result, sorted(left_out)
