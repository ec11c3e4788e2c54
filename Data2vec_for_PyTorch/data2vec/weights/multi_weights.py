"""data2vec 2.0's text encoder as the first version's: on whole texts the two compute the same."""

from __future__ import annotations

from torch import Tensor

from common.checkpoint_file import CheckpointError
from data2vec.model.encoder import EncoderConfig, SentenceEncoder
from data2vec.model.multi.model import Data2VecMulti

NORM_EPS = 1e-5  # of the first version's
_BLOCK = {"attn.proj": "self_attn.out_proj", "norm1": "self_attn_layer_norm", "norm2": "final_layer_norm"}
_BLOCK |= {"mlp.fc1": "fc1", "mlp.fc2": "fc2"}


def as_sentence_encoder(model: Data2VecMulti, teacher: bool = False) -> SentenceEncoder:
    """The student's encoder, or the teacher's blocks (behind the student's embeddings, unless it has its own).

    Raises:
        CheckpointError: of options that the first version has not: it has no such encoder.
    """
    block, modality = model.block, model.modality.config
    wanted = {"model.layer_norm_first": (block.layer_norm_first, False), "model.norm_eps": (block.norm_eps, NORM_EPS)}
    wanted |= {"model.norm_affine": (block.norm_affine, True)}
    wanted |= {
        f"model.modalities.text.{name}": (getattr(modality, name), 0) for name in ("prenet_depth", "num_extra_tokens")
    }
    for name, (value, only) in wanted.items():
        if value != only:
            raise CheckpointError(
                f"{name}={value}: such a text encoder has no counterpart here or in Hugging Face's, only {only}"
            )
    blocks, local = model.blocks, model.modality.local_encoder
    if teacher and model.config.ema_encoder_only:
        blocks = model.teacher
    elif teacher:
        blocks, local = model.teacher.blocks, model.teacher.modality.local_encoder or local
    encoder = SentenceEncoder(
        EncoderConfig(
            len(local.embed_tokens.weight),
            block.embed_dim,
            int(block.embed_dim * block.mlp_ratio),
            len(blocks),
            block.num_heads,
            modality.max_source_positions,
            modality.dropout,
            block.attention_dropout,
            block.activation_dropout,
            modality.layernorm_embedding,
            modality.no_scale_embedding,
        )
    )
    state = {**local.state_dict(), "version": encoder.version}
    for name, value in blocks.state_dict().items():
        state |= _to_first_version(name, value)
    encoder.load_state_dict(state)
    return encoder


def _to_first_version(name: str, value: Tensor) -> dict[str, Tensor]:
    number, _, rest = name.partition(".")
    module, _, kind = rest.rpartition(".")
    if module == "attn.qkv":
        parts = zip("qkv", value.chunk(3), strict=True)
        return {f"layers.{number}.self_attn.{letter}_proj.{kind}": part for letter, part in parts}
    return {f"layers.{number}.{_BLOCK[module]}.{kind}": value}
