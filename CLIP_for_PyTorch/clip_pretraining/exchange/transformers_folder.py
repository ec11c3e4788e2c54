"""Folders for `transformers`: the whole model, or its vision tower alone."""

from __future__ import annotations

from pathlib import Path

from transformers import (
    CLIPImageProcessor,
    CLIPProcessor,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers import VisionTextDualEncoderProcessor as DualEncoderProcessor

from clip_pretraining.exchange.open_clip_folder import clip_vision_config
from clip_pretraining.model.loading import ImageSettings
from common.run.new_file import readable


def write(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, settings: ImageSettings, folder: Path) -> str:
    """What run_clip.py trains, and `AutoModel` and `AutoProcessor` load."""
    model.save_pretrained(folder)
    readable(folder)
    processor_of(model, tokenizer, settings).save_pretrained(folder)
    return f'transformers.{type(model).__name__}.from_pretrained("{folder}"), run_clip.py --model_name_or_path {folder}'


def write_vision(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, settings: ImageSettings, folder: Path
) -> str:
    """A `CLIPVisionModelWithProjection`; its `image_embeds` are our image features. UsageError for another tower."""
    values = {**clip_vision_config(model).to_dict(), "projection_dim": model.config.projection_dim}
    tower = CLIPVisionModelWithProjection(CLIPVisionConfig.from_dict(values))
    tower.vision_model.load_state_dict(model.vision_model.state_dict())
    tower.visual_projection.load_state_dict(model.visual_projection.state_dict())
    tower.save_pretrained(folder)
    readable(folder)
    image_processor(settings).save_pretrained(folder)
    return f'transformers.CLIPVisionModelWithProjection.from_pretrained("{folder}")'


def image_processor(settings: ImageSettings) -> CLIPImageProcessor:
    """Prepares pictures as training does."""
    return CLIPImageProcessor(
        size={"shortest_edge": settings.size},
        crop_size={"height": settings.size, "width": settings.size},
        image_mean=list(settings.mean),
        image_std=list(settings.std),
    )


def processor_of(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, settings: ImageSettings
) -> CLIPProcessor | DualEncoderProcessor:
    """Saved with the model, so that `transformers` users load one folder."""
    family = CLIPProcessor if model.config.model_type == "clip" else DualEncoderProcessor
    return family(image_processor(settings), tokenizer)
