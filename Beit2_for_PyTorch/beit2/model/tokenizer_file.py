"""A tokenizer of the shape that its file has."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from beit2.model.names import TOKENIZERS, create_tokenizer
from beit2.model.tokenizer import VQKD, load_tokenizer_weights
from beit2.weights.download import local_file
from beit2.weights.files import read_state_dict, saved_options
from common.errors import UsageError

PUBLISHED = "vqkd_encoder_base_decoder_3x768x12_clip"
_NEEDED = ("quantize.embedding.weight", "encoder.patch_embed.proj.weight", "encoder.pos_embed")


def tokenizer_of(location: str, name: str | None = None) -> VQKD:
    """The tokenizer, ready to encode, in a file, at an address or under a published name.

    Args:
        name: of the model; by default what its training was told, else one with such an encoder.

    Raises:
        UsageError: no tokenizer's weights, or another model's.
    """
    path = local_file(location)
    trained = saved_options(path)
    state = read_state_dict(path, keys=("model", "state_dict", "module"))
    absent = [key for key in _NEEDED if key not in state]
    if absent:
        raise UsageError(f"{path}: not a VQ-KD tokenizer (no {absent[0]} in it); give one of run_vqkd_training.py")
    codes, convolution, positions = (state[key] for key in _NEEDED)
    patch, side = convolution.shape[-1], round((positions.shape[1] - 1) ** 0.5)
    tokenizer = create_tokenizer(
        name or getattr(trained, "model", None) or _name_of(state, path),
        img_size=side * patch, patch_size=patch, n_code=codes.shape[0], code_dim=codes.shape[1],
        process_type=getattr(trained, "process_type", "default"),
    ).for_encoding()  # fmt: skip
    load_tokenizer_weights(tokenizer, path)
    return tokenizer


def patch_of(path: Path) -> int | None:
    """The patch size of the tokenizer in a file; None where it holds none."""
    convolution = read_state_dict(path, keys=("model", "state_dict", "module")).get(_NEEDED[1])
    return None if convolution is None else convolution.shape[-1]


def _name_of(state: dict[str, Tensor], path: Path) -> str:
    """The first model with such an encoder; what follows it does not encode."""
    depth = len({name.split(".")[2] for name in state if name.startswith("encoder.blocks.")})
    width = state["encoder.pos_embed"].shape[-1]
    for name, shape in TOKENIZERS.items():
        if (shape["dim"], shape["depth"]) == (width, depth):
            return name
    raise UsageError(f"{path}: an encoder of {depth} blocks of {width} values, which no known tokenizer has")
