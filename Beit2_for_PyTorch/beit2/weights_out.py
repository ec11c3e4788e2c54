"""Checkpoints for other libraries: timm's Beit, transformers' Beit*, and plain safetensors.

Each is written by the library's own model, whose output is compared with ours before.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import torch
from torch import Tensor, nn

from beit2.model.convert import convert_pretrained
from beit2.model.from_weights import Shape, encoder_from_weights
from beit2.model.masked_image_model import MaskedImageModel
from beit2.model.vision_transformer import VisionTransformer
from beit2.weights.transformers_names import to_transformers
from common.errors import UsageError
from common.run.new_file import readable

MAX_DIFFERENCE = 1e-5  # of outputs, relative to their largest
LIBRARIES = ("timm", "transformers", "safetensors")
_INDEX = "relative_position_index"


def export_timm(state: dict[str, Tensor], folder: Path, mean: tuple, std: tuple) -> float:
    """Writes a folder for `timm.create_model("local-dir:FOLDER")`; a pretraining model as its encoder.

    Returns:
        The largest difference of the outputs.
    """
    import timm
    from timm.models import save_for_hf
    from timm.models.beit import Beit

    ours = _per_block(encoder_from_weights(state))
    shape = Shape.of(ours.state_dict())
    arguments = {
        "img_size": shape.pixels,
        "patch_size": shape.patch,
        "embed_dim": shape.width,
        "depth": shape.depth,
        "num_heads": shape.heads,
        "init_values": 1.0 if shape.layer_scale else None,
        "use_abs_pos_emb": shape.absolute,
        "use_rel_pos_bias": shape.own_bias,
    }
    pooling = "avg" if shape.mean_pooling else "token"
    theirs = Beit(num_classes=shape.classes, global_pool=pooling, **arguments).eval()
    theirs.load_state_dict({name: t for name, t in ours.state_dict().items() if not name.endswith(_INDEX)})
    size = (3, shape.pixels, shape.pixels)
    known = timm.models.get_pretrained_cfg("beitv2_base_patch16_224").to_dict()
    kept = {name: known[name] for name in ("interpolation", "crop_pct", "first_conv", "classifier", "fixed_input_size")}
    theirs.pretrained_cfg = kept | {"architecture": "beitv2_base_patch16_224", "tag": "", "input_size": size}
    theirs.pretrained_cfg |= {"mean": mean, "std": std, "num_classes": shape.classes}
    difference = _difference(ours, theirs, shape)
    theirs.num_features = shape.width
    arguments |= {"global_pool": pooling}
    save_for_hf(theirs, str(folder), model_args=arguments, safe_serialization=True)
    return difference


def export_transformers(state: dict[str, Tensor], folder: Path, mean: tuple, std: tuple) -> float:
    """Writes a folder for `from_pretrained`: BeitForImageClassification, BeitForMaskedImageModeling, or BeitModel.

    The masked image model has the main head; the head on the CLS token of section 2.3 exists for training alone.
    """
    import transformers

    shape = Shape.of(state)
    config = transformers.BeitConfig(
        vocab_size=shape.vocabulary or 8192,
        hidden_size=shape.width,
        num_hidden_layers=shape.depth,
        num_attention_heads=shape.heads,
        intermediate_size=4 * shape.width,
        layer_norm_eps=1e-6,
        image_size=shape.pixels,
        patch_size=shape.patch,
        use_mask_token=bool(shape.vocabulary),
        use_absolute_position_embeddings=shape.absolute,
        use_relative_position_bias=shape.own_bias,
        use_shared_relative_position_bias=shape.shared_bias,
        layer_scale_init_value=1.0 if shape.layer_scale else 0.0,
        use_mean_pooling=shape.mean_pooling or bool(shape.vocabulary),
        num_labels=shape.classes or 2,
    )
    if shape.vocabulary:
        ours, theirs = _masked_image_model(state, shape), transformers.BeitForMaskedImageModeling(config).eval()
    elif shape.classes:
        ours, theirs = encoder_from_weights(state), transformers.BeitForImageClassification(config).eval()
    else:
        ours, theirs = encoder_from_weights(state), transformers.BeitModel(config).eval()
    weights = to_transformers(ours.state_dict(), "" if type(theirs) is transformers.BeitModel else "beit.")
    expected = set(theirs.state_dict())
    theirs.load_state_dict({name: tensor for name, tensor in weights.items() if name in expected})
    difference = _difference(ours, theirs, shape)
    theirs.save_pretrained(folder)
    readable(folder)
    size = {"height": shape.pixels, "width": shape.pixels}
    transformers.BeitImageProcessor(
        size=size, do_center_crop=False, image_mean=list(mean), image_std=list(std), resample=3
    ).save_pretrained(folder)
    return difference


def export_safetensors(state: dict[str, Tensor], folder: Path, about: dict) -> float:
    """Writes model.safetensors under our names, which every script here takes; `about` goes into its header."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.contiguous() for name, tensor in state.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"beit2": json.dumps(about)})
    readable(folder)
    return 0.0


def _per_block(encoder: VisionTransformer) -> VisionTransformer:
    """The same encoder with the shared table copied to every block, as timm's published models have it."""
    state = encoder.state_dict()
    shape = Shape.of(state)
    if not shape.shared_bias:
        return encoder
    other = dataclasses.replace(shape, shared_bias=False, own_bias=True).encoder()
    other.load_state_dict(convert_pretrained(state, other), strict=False)
    return other


def _masked_image_model(state: dict[str, Tensor], shape: Shape) -> MaskedImageModel:
    """Without the CLS head."""
    model = MaskedImageModel(
        shape.vocabulary, img_size=shape.pixels, patch_size=shape.patch, embed_dim=shape.width, depth=shape.depth,
        num_heads=shape.heads, init_values=1.0 if shape.layer_scale else None, use_abs_pos_emb=shape.absolute,
        use_shared_rel_pos_bias=shape.shared_bias,
    )  # fmt: skip
    model.load_state_dict({name: tensor for name, tensor in state.items() if not name.startswith("cls_pt_")})
    return model.eval()


@torch.no_grad()
def _difference(ours: nn.Module, theirs: nn.Module, shape: Shape) -> float:
    """The largest difference of the two outputs for two made-up pictures, relative to the largest output.

    Raises:
        UsageError: it is more than rounding.
    """
    images = torch.randn(2, 3, shape.pixels, shape.pixels, generator=torch.Generator().manual_seed(0))
    if isinstance(ours, MaskedImageModel):
        mask = torch.arange(shape.side**2).expand(2, -1) % 3 == 0  # [2, N]
        expected, found = ours(images, mask, return_all_tokens=True), theirs(images, bool_masked_pos=mask).logits
    else:
        expected, found = ours(images), theirs(images)
        found = found if isinstance(found, Tensor) else found.logits if shape.classes else found.pooler_output
    difference = float((found - expected).abs().max() / expected.abs().max())
    if not difference < MAX_DIFFERENCE:
        raise UsageError(
            f"the exported model's output differs by {difference:.1e}: nothing was written, please report it"
        )
    return difference
