"""Which of our tensors are which of open_clip's. OpenAI's names are open_clip's `CLIP`; both share `visual.*`.

Ours are those of `transformers`. open_clip keeps query, key and value in one tensor and multiplies by its projections
from the other side.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from transformers import CLIPTextModel, PreTrainedModel

from common.errors import UsageError

_BLOCK = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "self_attn.out_proj": "attn.out_proj",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}
_VISION_ENDS = {
    "embeddings.patch_embedding.weight": "conv1.weight",
    "embeddings.class_embedding": "class_embedding",
    "embeddings.position_embedding.weight": "positional_embedding",
    "pre_layrnorm.weight": "ln_pre.weight",  # sic: transformers' spelling
    "pre_layrnorm.bias": "ln_pre.bias",
    "post_layernorm.weight": "ln_post.weight",
    "post_layernorm.bias": "ln_post.bias",
}
_TEXT_ENDS = {
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
    "final_layer_norm.weight": "ln_final.weight",
    "final_layer_norm.bias": "ln_final.bias",
}
_NO_WEIGHTS = ("attn_mask", "position_ids", "input_resolution", "context_length", "vocab_size")  # what older files hold


class Source(NamedTuple):
    """Our tensors that one of open_clip's is made of: stacked along the first axis, or transposed."""

    names: tuple[str, ...]
    transposed: bool = False


def table(model: PreTrainedModel) -> dict[str, Source]:
    """{open_clip's name: ours} of every tensor of a model: `CLIP` for a CLIPModel, `CustomTextCLIP` for RoBERTa."""
    names = _tower("vision_model.", "visual.", _VISION_ENDS, model.config.vision_config.num_hidden_layers)
    names["visual.proj"] = Source(("visual_projection.weight",), transposed=True)
    if isinstance(model.text_model, CLIPTextModel):
        names |= _tower("text_model.", "", _TEXT_ENDS, model.config.text_config.num_hidden_layers)
        names["text_projection"] = Source(("text_projection.weight",), transposed=True)
    else:
        names |= {f"text.transformer.{name}": Source((f"text_model.{name}",)) for name in model.text_model.state_dict()}
        names["text.proj.weight"] = Source(("text_projection.weight",))
    scalars = [name for name in ("logit_scale", "logit_bias") if getattr(model, name, None) is not None]
    return names | {name: Source((name,)) for name in scalars}


def _tower(ours: str, theirs: str, ends: dict[str, str], layers: int) -> dict[str, Source]:
    names = {theirs + new: Source((ours + old,)) for old, new in ends.items()}
    for layer in range(layers):
        old_block, new_block = f"{ours}encoder.layers.{layer}", f"{theirs}transformer.resblocks.{layer}"
        for part in ("weight", "bias"):
            names |= {
                f"{new_block}.{new}.{part}": Source((f"{old_block}.{old}.{part}",)) for old, new in _BLOCK.items()
            }
            qkv = tuple(f"{old_block}.self_attn.{kind}_proj.{part}" for kind in "qkv")
            names[f"{new_block}.attn.in_proj_{part}"] = Source(qkv)
    return names


def to_open_clip(model: PreTrainedModel) -> dict[str, Tensor]:
    """The model's tensors under open_clip's names, copies."""
    state, result = model.state_dict(), {}
    for name, source in table(model).items():
        tensor = torch.cat([state[n] for n in source.names]) if len(source.names) > 1 else state[source.names[0]]
        result[name] = (tensor.T if source.transposed else tensor).detach().clone().contiguous()
    return result


def load_open_clip(model: PreTrainedModel, state: dict[str, Tensor], name: str) -> None:
    """Fills a model from tensors under open_clip's names.

    Args:
        name: of the file, for messages.

    Raises:
        UsageError: tensors that are missing, too many, or of another shape.
    """
    wanted = table(model)
    state = {key: value for key, value in state.items() if key.rsplit(".", 1)[-1] not in _NO_WEIGHTS}
    missing, unknown = sorted(wanted.keys() - state.keys()), sorted(state.keys() - wanted.keys())
    if missing or unknown:
        what = f"lacks {missing[0]}" if missing else f"has {unknown[0]}, which a CLIP of this configuration has not"
        raise UsageError(f"{name}: {what} ({len(missing)} tensors are missing, {len(unknown)} are too many)")
    shapes, ours = {key: value.shape for key, value in model.state_dict().items()}, {}
    for key, source in wanted.items():
        tensor = state[key].float()  # float32 masters, as `loading` has them
        parts = (tensor.T if source.transposed else tensor).chunk(len(source.names)) if tensor.dim() else [tensor]
        for own, part in zip(source.names, parts, strict=False):
            if part.numel() != shapes[own].numel() or (part.dim() > 1 and part.shape != shapes[own]):
                raise UsageError(
                    f"{name}: {key} is {list(state[key].shape)}, which does not fit the configuration: it must be "
                    f"{list(shapes[own])} ({own})"
                )
            ours[own] = part.reshape(shapes[own])
    model.load_state_dict(ours)
