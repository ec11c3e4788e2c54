"""Weights to and from Hugging Face `Data2VecTextModel` folders, which hold neither head nor teacher."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch

from common.checkpoint_file import CheckpointError
from common.run.new_file import readable
from data2vec.model.encoder import EncoderConfig, SentenceEncoder

PREFIX = "encoder.sentence_encoder."
UNKNOWN = 3  # <unk>
LAYER_NORM_EPS = 1e-5  # torch's default, which fairseq's text encoder has
# ours (below PREFIX) -> theirs
_EMBEDDINGS = {
    "embed_tokens": "embeddings.word_embeddings",
    "embed_positions": "embeddings.position_embeddings",
    "layernorm_embedding": "embeddings.LayerNorm",
}
_LAYER = {
    "self_attn.q_proj": "attention.self.query",
    "self_attn.k_proj": "attention.self.key",
    "self_attn.v_proj": "attention.self.value",
    "self_attn.out_proj": "attention.output.dense",
    "self_attn_layer_norm": "attention.output.LayerNorm",
    "fc1": "intermediate.dense",
    "fc2": "output.dense",
    "final_layer_norm": "output.LayerNorm",
}


def _to_huggingface_name(name: str) -> str:
    module, _, kind = name.rpartition(".")
    if module in _EMBEDDINGS:
        return f"{_EMBEDDINGS[module]}.{kind}"
    _, number, module = module.split(".", 2)
    return f"encoder.layer.{number}.{_LAYER[module]}.{kind}"


def export_huggingface(encoder: SentenceEncoder, folder: str | Path, ids: int | None = None) -> None:
    """Writes `config.json` and `model.safetensors` of a headless `Data2VecTextModel`.

    Args:
        ids: how many the tokenizer has (`export_tokenizer`); those the model lacks get a copy of <unk>'s row.

    Raises:
        FileExistsError: the folder has a model already.
        ValueError: an encoder without embedding LayerNorm or with scaled embeddings, which that class does not have.
    """
    from transformers import Data2VecTextConfig, Data2VecTextModel

    config, folder = encoder.config, Path(folder)
    if not config.layernorm_embedding or not config.no_scale_embedding:
        raise ValueError("Data2VecTextModel needs layernorm_embedding=true and no_scale_embedding=true")
    if (folder / "config.json").exists():
        raise FileExistsError(f"{folder} holds a model already and is not overwritten")
    words = encoder.embed_tokens.weight
    more = (ids or config.vocab_size) - config.vocab_size
    theirs = Data2VecTextModel(
        Data2VecTextConfig(
            vocab_size=config.vocab_size + more,
            words_in_training=config.vocab_size,  # ours, for the way back
            tokenizer_class="PreTrainedTokenizerFast",  # else AutoTokenizer makes an empty RobertaTokenizer up
            hidden_size=config.embed_dim,
            num_hidden_layers=config.layers,
            num_attention_heads=config.attention_heads,
            intermediate_size=config.ffn_embed_dim,
            max_position_embeddings=config.max_source_positions + config.pad_index + 1,
            hidden_dropout_prob=config.dropout,
            attention_probs_dropout_prob=config.attention_dropout,
            type_vocab_size=1,
            layer_norm_eps=LAYER_NORM_EPS,
            pad_token_id=config.pad_index,
        ),
        add_pooling_layer=False,
    )
    state = {_to_huggingface_name(name): value for name, value in encoder.named_parameters()}
    state["embeddings.word_embeddings.weight"] = torch.cat((words, words[UNKNOWN].expand(more, -1)))
    state["embeddings.token_type_embeddings.weight"] = torch.zeros(1, config.embed_dim)
    theirs.load_state_dict(state, strict=False)
    theirs.save_pretrained(folder)
    readable(folder)


def load_huggingface(folder: str | Path) -> dict[str, dict[str, Any]]:
    """{"model": student weights under the reference's names} of a `Data2VecTextModel` folder; its heads as "cfg".

    The token type embedding, which is added to every position, goes into the position embeddings.

    Raises:
        CheckpointError: not such a folder, or another activation than gelu.
    """
    from transformers import Data2VecTextModel

    try:
        theirs = Data2VecTextModel.from_pretrained(folder, add_pooling_layer=False, local_files_only=True)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{folder}: not a Data2VecTextModel folder, as is needed ({str(error).splitlines()[0]})"
        ) from None
    config = theirs.config
    if config.model_type != "data2vec-text":
        raise CheckpointError(f"{folder}: holds a {config.model_type}; a data2vec-text model is needed")
    if config.hidden_act != "gelu":
        raise CheckpointError(f"{folder}: hidden_act={config.hidden_act}: data2vec text has gelu only")
    if config.layer_norm_eps != LAYER_NORM_EPS:
        warnings.warn(
            f"{folder}: layer_norm_eps={config.layer_norm_eps:g}, here it is {LAYER_NORM_EPS:g} as in fairseq: outputs "
            "will differ a little",
            stacklevel=2,
        )
    words = getattr(config, "words_in_training", config.vocab_size)
    encoder = EncoderConfig(
        vocab_size=words,
        embed_dim=config.hidden_size,
        ffn_embed_dim=config.intermediate_size,
        layers=config.num_hidden_layers,
        attention_heads=config.num_attention_heads,
        max_source_positions=config.max_position_embeddings - config.pad_token_id - 1,
    )
    state = theirs.state_dict()
    with torch.device("meta"):
        names = [name for name, _ in SentenceEncoder(encoder).named_parameters()]
    ours = {PREFIX + name: state[_to_huggingface_name(name)] for name in names}
    ours[PREFIX + "embed_tokens.weight"] = ours[PREFIX + "embed_tokens.weight"][:words]
    positions = ours[PREFIX + "embed_positions.weight"]
    ours[PREFIX + "embed_positions.weight"] = positions + state["embeddings.token_type_embeddings.weight"]
    heads = {"transformer": {"encoder": {"attention_heads": config.num_attention_heads}}}  # shapes do not tell it
    return {"cfg": {"model": heads}, "model": {PREFIX + "version": torch.tensor([3.0]), **ours}}
