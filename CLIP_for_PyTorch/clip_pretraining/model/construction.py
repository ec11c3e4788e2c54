"""New models: two pretrained towers joined, or small and base ones with random weights and a trained tokenizer."""

from __future__ import annotations

import csv
import json
from pathlib import Path

from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPVisionConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    RobertaConfig,
    VisionTextDualEncoderConfig,
    VisionTextDualEncoderModel,
)

from clip_pretraining.data.tokenization import load_tokenizer, openai_tokenizer, train_tokenizer
from clip_pretraining.model import loading
from clip_pretraining.model.loading import ImageSettings
from common.errors import UsageError

# width, depth, heads, MLP of both towers; picture, patch; projection; words of a tokenizer trained for it
SIZES = {
    "tiny": {"width": 64, "depth": 2, "heads": 4, "image": 32, "patch": 8, "projection": 64, "words": 1000},
    "mini": {"width": 96, "depth": 3, "heads": 3, "image": 48, "patch": 8, "projection": 96, "words": 2000},
    "base": {"width": 768, "depth": 12, "heads": 12, "image": 224, "patch": 32, "projection": 512, "words": 50265},
}


Built = tuple[PreTrainedModel, PreTrainedTokenizerBase, ImageSettings]


def from_pretrained(vision: str, text: str) -> Built:
    """The reference's model: a CLIP vision tower, a RoBERTa, new projections drawn from torch's current seed."""
    for name in (vision, text):
        if name.count("/") > 1 and not Path(name).is_dir():
            raise UsageError(f"{name}: no such folder; name one with the model's files, or a model of the hub")
    try:
        model = VisionTextDualEncoderModel.from_vision_text_pretrained(vision, text)
        tokenizer = load_tokenizer(text)
    except (OSError, ValueError) as error:
        raise UsageError(
            f"{vision} and {text} cannot be joined: {loading.first_line(error)}. Both are hub names (needs network) "
            "or folders; without either use --tiny --captions FILE"
        ) from None
    return model, tokenizer, loading.image_settings(vision, model.config)


def from_scratch(
    size: str, family: str, captions: list[str] | None, image_size: int | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, ImageSettings]:
    """A model with random weights.

    Args:
        size: a key of SIZES.
        family: "dual" (CLIP-ViT + RoBERTa) or "clip" (CLIPModel).
        captions: a tokenizer is trained on them; CLIPModel without captions takes OpenAI's.
        image_size: side of the picture, default the size's own.
    """
    shape = SIZES[size]
    image_size = image_size or shape["image"]
    if image_size < 1 or image_size % shape["patch"]:
        raise UsageError(f"--image_size {image_size}: must be a multiple of the patch size {shape['patch']}")
    if captions is None and family == "dual":
        raise UsageError("--captions FILE is needed: the tokenizer is trained on them")
    for_clip = family == "clip"
    tokenizer = openai_tokenizer() if captions is None else train_tokenizer(captions, shape["words"], for_clip)
    tower = {
        "hidden_size": shape["width"],
        "num_hidden_layers": shape["depth"],
        "num_attention_heads": shape["heads"],
        "intermediate_size": 4 * shape["width"],
        "projection_dim": shape["projection"],
    }
    vision = CLIPVisionConfig(**tower, image_size=image_size, patch_size=shape["patch"])
    special = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    if for_clip:
        special["pad_token_id"] = tokenizer.pad_token_id
        text = CLIPTextConfig(**tower, **special, vocab_size=len(tokenizer))
        config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=shape["projection"])
        return CLIPModel(config), tokenizer, ImageSettings(image_size)
    tower.pop("projection_dim")
    text = RobertaConfig(
        **tower, vocab_size=len(tokenizer), max_position_embeddings=514 if size == "base" else 66, type_vocab_size=1
    )
    config = VisionTextDualEncoderConfig.from_vision_text_configs(vision, text, projection_dim=shape["projection"])
    return VisionTextDualEncoderModel(config), tokenizer, ImageSettings(image_size)


def read_captions(path: Path) -> list[str]:
    """Captions of a text file (one a line), COCO's .json, or a .csv, .tsv or .jsonl with a column `caption`."""
    try:
        text = path.read_text(encoding="utf-8")
        captions = text.splitlines()
        if path.suffix == ".json":
            captions = [annotation["caption"] for annotation in json.loads(text)["annotations"]]
        elif path.suffix == ".jsonl":
            captions = [json.loads(line)["caption"] for line in captions if line.strip()]
        elif path.suffix in (".csv", ".tsv"):
            rows = csv.DictReader(text.splitlines(keepends=True), delimiter="," if path.suffix == ".csv" else "\t")
            captions = [row["caption"] or "" for row in rows]
    except OSError as error:
        raise UsageError(f"--captions {path}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(
            f"--captions {path}: neither text, COCO captions nor a table with a column caption ({error!r})"
        ) from None
    captions = [caption.strip() for caption in captions if caption.strip()]
    if not captions:
        raise UsageError(f"--captions {path}: no captions in it")
    return captions
