"""AutoConfig, AutoModel and AutoProcessor: by name or of a checkpoint, as in MindFormers' README."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor
from typing_extensions import Self

from vit.api.image_processor import ViTImageProcessor
from vit.config.description import config_of_file
from vit.find_weights import checkpoint_of, weights_of
from vit.model.vision_transformer import PRESETS, ClassifyingViT, ViTConfig, build, field_names, preset
from vit.weights import download
from vit.weights.hub_files import save_pretrained
from vit.weights.loading import load_weights


class AutoConfig:
    """Configurations by name or of a checkpoint."""

    @staticmethod
    def from_pretrained(name_or_path: str | Path, **changes: Any) -> ViTConfig:
        """The configuration of a known model ("vit_base_p16", "mindspore/vit_base_p16") or of a checkpoint.

        Args:
            changes: fields of `ViTConfig` to replace.

        Raises:
            ValueError: neither a known name nor a file, an unknown field, or a file that does not tell its sizes.
            CheckpointError: not a checkpoint.
        """
        unknown = changes.keys() - field_names()
        if unknown:
            raise ValueError(f"unknown configuration field {', '.join(sorted(unknown))}")
        if Path(name_or_path).exists():
            return config_of_file(checkpoint_of(name_or_path), **changes)
        name = str(name_or_path).removeprefix("mindspore/")
        model = download.PUBLISHED[name].model if name in download.PUBLISHED else name
        if model not in PRESETS:
            known = ", ".join(dict.fromkeys([*PRESETS, *download.PUBLISHED]))
            raise ValueError(f"{name_or_path}: neither a file or folder nor a known model name ({known})")
        return preset(model, **changes)


class ViTForImageClassification(ClassifyingViT):
    """A classifier [B, 3, S, S] -> logits [B, C], in evaluation mode; the reference's return `(logits, None)`."""

    @classmethod
    def from_config(cls, config: ViTConfig) -> Self:
        """A model with fresh weights. The reference loads published ones here: `from_pretrained` does it, by name."""
        return build(config, cls).eval()

    @classmethod
    def from_pretrained(cls, name_or_path: str | Path, config: ViTConfig | None = None) -> Self:
        """A model with its weights.

        Args:
            name_or_path: a published name (downloaded at its first use), a checkpoint file (.pth, .pt, .safetensors,
                MindSpore .ckpt), the output folder of a training run (its best checkpoint), or a folder that
                `save_pretrained`, timm or Hugging Face wrote.
            config: the sizes, where a file does not tell them.

        Raises:
            ValueError, CheckpointError, DownloadError: each says what is wrong and what to do.
        """
        model = cls.from_config(config or AutoConfig.from_pretrained(name_or_path))
        missing, _ = load_weights(model, weights_of(name_or_path))
        if "head.weight" in missing and not issubclass(cls, ViTModel):
            print(
                f"note: {name_or_path} has no classifier: the model's knows nothing; ViTModel gives features",
                file=sys.stderr,
            )
        return model

    def save_pretrained(self, folder: str | Path, class_names: Sequence[str] | None = None) -> Path:
        """Writes a folder for `from_pretrained`, timm and transformers; see `hub_files.save_pretrained`."""
        return save_pretrained(self, folder, class_names)


class ViTModel(ViTForImageClassification):
    """The backbone alone: [B, 3, S, S] -> pooled features [B, D]."""

    def forward(self, images: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(images), pre_logits=True)


class AutoModel:
    """`ViTForImageClassification` by name, of a checkpoint, or from a configuration."""

    from_config = ViTForImageClassification.from_config
    from_pretrained = ViTForImageClassification.from_pretrained


class ViTProcessor:
    """What prepares input: `processor(images)["image"]` is float32 [B, 3, S, S]."""

    def __init__(self, image_processor: ViTImageProcessor):
        self.image_processor = image_processor

    def __call__(self, image_input: Any) -> dict[str, Tensor]:
        return {"image": self.image_processor(image_input)}


class AutoProcessor:
    """Processors by the model they belong to."""

    @staticmethod
    def from_pretrained(name_or_path: str | Path) -> ViTProcessor:
        """Resize, crop and normalisation as evaluation does them for this model."""
        return ViTProcessor(ViTImageProcessor.of(AutoConfig.from_pretrained(name_or_path)))
