"""Both towers as ONNX files, any batch and caption length; the features are L2-normalised."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from clip_pretraining.exchange.transformers_folder import processor_of
from clip_pretraining.model.layers import full_attention_mask
from clip_pretraining.model.loading import ImageSettings, encode_images, encode_texts, max_caption_tokens
from common.model import onnx_file


class ImageTower(nn.Module):
    """pixel_values float32 [B, 3, S, S], normalised -> image_embeds [B, d]."""

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor) -> Tensor:
        return encode_images(self.model, pixel_values)


class TextTower(nn.Module):
    """input_ids, attention_mask int64 [B, L] -> text_embeds [B, d]."""

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return encode_texts(self.model, input_ids, full_attention_mask(attention_mask, self.model.text_model))


def write(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, settings: ImageSettings, folder: Path) -> str:
    """FOLDER/vision.onnx and text.onnx, with the processor's and tokenizer's files beside them.

    Both files' metadata has `clip`: logit_scale (a logarithm), logit_bias or null, and how pictures are prepared.

    Raises:
        UsageError: onnx or onnxscript is not installed.
    """
    batch = torch.export.Dim("batch")
    length = torch.export.Dim("length", min=2, max=max_caption_tokens(model.config))
    bias = getattr(model, "logit_bias", None)
    scalars = {"logit_scale": model.logit_scale.item(), "logit_bias": None if bias is None else bias.item()}
    told = {"clip": {**scalars, "pictures": asdict(settings)}}
    folder.mkdir(parents=True, exist_ok=True)
    pixels = {"pixel_values": torch.zeros(2, 3, settings.size, settings.size)}
    onnx_file.write(ImageTower(model), pixels, "image_embeds", ({0: batch},), told, folder / "vision.onnx")
    ids = torch.full((2, 4), tokenizer.eos_token_id)
    words, dims = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, ({0: batch, 1: length},) * 2
    onnx_file.write(TextTower(model), words, "text_embeds", dims, told, folder / "text.onnx")
    processor_of(model, tokenizer, settings).save_pretrained(folder)
    return f'onnxruntime.InferenceSession("{folder}/vision.onnx"), .../text.onnx'
