"""Both towers as ONNX files, any batch and caption length; the features are L2-normalised."""

from __future__ import annotations

import json
import warnings
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from clip_pretraining.exchange.transformers_folder import processor_of
from clip_pretraining.model.layers import full_attention_mask
from clip_pretraining.model.loading import ImageSettings, encode_images, encode_texts, max_caption_tokens
from common.errors import UsageError

ONE_FILE_BYTES = 2_000_000_000  # protobuf ends at 2 GiB: larger towers keep their weights in a file beside it


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
    try:
        import onnx
        import onnxscript  # noqa: F401  (torch's exporter needs it)
    except ImportError as error:
        raise UsageError(f"--to onnx: {error}: pip install onnx onnxscript -c ../constraints.txt") from None
    batch = torch.export.Dim("batch")
    length = torch.export.Dim("length", min=2, max=max_caption_tokens(model.config))
    pixels = torch.zeros(2, 3, settings.size, settings.size)  # not 1, which would be taken for a constant
    ids = torch.full((2, 4), tokenizer.eos_token_id)
    towers = {
        "vision": (ImageTower(model), {"pixel_values": pixels}, ({0: batch},), "image_embeds"),
        "text": (
            TextTower(model),
            {"input_ids": ids, "attention_mask": torch.ones_like(ids)},
            ({0: batch, 1: length}, {0: batch, 1: length}),
            "text_embeds",
        ),
    }
    bias = getattr(model, "logit_bias", None)
    scalars = {"logit_scale": model.logit_scale.item(), "logit_bias": None if bias is None else bias.item()}
    folder.mkdir(parents=True, exist_ok=True)
    for name, (tower, inputs, shapes, output) in towers.items():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's own, of its tree code and of axes that two inputs share
            program = torch.onnx.export(
                tower.eval(),
                tuple(inputs.values()),
                input_names=list(inputs),
                output_names=[output],
                dynamic_shapes=shapes,
                verbose=False,
            )
        program.model.metadata_props["clip"] = json.dumps({**scalars, "pictures": asdict(settings)})
        part = model.vision_model if name == "vision" else model.text_model
        large = sum(tensor.nbytes for tensor in part.state_dict().values()) > ONE_FILE_BYTES
        program.save(folder / f"{name}.onnx", external_data=large)
        onnx.checker.check_model(str(folder / f"{name}.onnx"))
    processor_of(model, tokenizer, settings).save_pretrained(folder)
    return f'onnxruntime.InferenceSession("{folder}/vision.onnx"), .../text.onnx'
