"""Prediction for pictures: `pipeline("image_classification", model=...)(pictures, top_k=3)`.

Not named pipeline.py: importing a module of that name would hide the function `vit.pipeline`.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common import device as devices
from vit import cpu_patches, npu_patches
from vit.api.image_processor import ViTImageProcessor, image_list
from vit.config.description import config_of_file
from vit.find_weights import weights_of
from vit.model.vision_transformer import ClassifyingViT, build
from vit.weights.labels import labels_for, load_class_names
from vit.weights.loading import load_weights

TASK = "image_classification"
Prediction = dict[str, float | str]  # {"score": ..., "label": ...}


def check_task(task: str) -> None:
    """ValueError for any other task than image_classification."""
    if task != TASK:
        raise ValueError(f"unknown task {task!r}; this project has {TASK!r}")


class ImageClassificationPipeline:
    """A model with its labels and image processor; made by `pipeline`."""

    def __init__(
        self,
        model: ClassifyingViT,
        labels: Sequence[str],
        image_processor: Callable[[Any], Tensor],
        device: torch.device,
        precision: str = "fp32",
        batch_size: int = 32,
    ):
        self.model, self.labels, self.image_processor = model.to(device).eval(), list(labels), image_processor
        self.device, self.precision, self.batch_size = device, precision, batch_size
        npu_patches.apply(model, device)
        cpu_patches.apply(model, device)

    def __call__(self, images: Any, top_k: int | None = 3) -> list[list[Prediction]]:
        """The best labels of each picture, best first; also a single picture gives a list of one list.

        Args:
            images: what `ViTImageProcessor` takes.
            top_k: how many labels; None, or more than there are, gives all.

        Raises:
            BrokenImage: names the file that cannot be read.
            ValueError: top_k below 0, or no pictures.
        """
        pictures = image_list(images)
        if not pictures:
            raise ValueError("no pictures: the list is empty")
        results: list[list[Prediction]] = []
        for first in range(0, len(pictures), self.batch_size):
            results += self.of_batch(self.image_processor(pictures[first : first + self.batch_size]), top_k)
        return results

    @torch.inference_mode()
    def of_batch(self, batch: Tensor, top_k: int | None = 3) -> list[list[Prediction]]:
        """The best labels of prepared pictures [B, 3, S, S]. ValueError: top_k below 0, or scores inf or nan."""
        if top_k is not None and top_k < 0:
            raise ValueError(f"top_k={top_k}: must be 0 or more, or None for all labels")
        count = len(self.labels) if top_k is None else min(top_k, len(self.labels))
        with devices.autocast(self.device, self.precision):
            logits = self.model(batch.to(self.device))  # [B, C]
        if not bool(logits.isfinite().all()):
            raise ValueError("the scores are inf or nan: the weights are damaged, or --precision is too low for them")
        scores, classes = logits.float().softmax(dim=1).topk(count, dim=1)  # [B, k]
        rows = zip(scores.tolist(), classes.tolist(), strict=True)
        return [
            [{"score": score, "label": self.labels[index]} for score, index in zip(*row, strict=True)] for row in rows
        ]


def _device(name: str | int) -> torch.device:
    return devices.resolve("auto", name) if isinstance(name, int) else devices.resolve(name)


def pipeline(
    task: str = TASK,
    model: str | Path | ClassifyingViT = "vit_base_p16",
    *,
    image_processor: Callable[[Any], Tensor] | None = None,
    candidate_labels: Sequence[str] | None = None,
    image_size: int | None = None,
    device: str | int | torch.device = "auto",
    precision: str = "fp32",
    batch_size: int = 32,
) -> ImageClassificationPipeline:
    """A model ready to predict.

    Args:
        model: a published name, a checkpoint file, the output folder of a training run, or a module.
        image_processor: None = what evaluation does with the model's pictures.
        candidate_labels: one per class. None = the class names kept beside the checkpoint, else ImageNet's for 1000
            classes, else class_0, class_1, ...
        image_size: side of the model's input where it shall differ from the checkpoint's.
        device: auto, npu, cuda or cpu, or the number of the accelerator.

    Raises:
        ValueError, CheckpointError, DownloadError, UsageError: each says what is wrong and what to do.
    """
    check_task(task)
    target = device if isinstance(device, torch.device) else _device(device)
    devices.require_precision(target, precision)
    if not isinstance(model, torch.nn.Module):
        path = weights_of(model)
        changes = {} if image_size is None else {"image_size": image_size}
        candidate_labels = candidate_labels if candidate_labels is not None else load_class_names(path)
        model = build(config_of_file(path, **changes))
        load_weights(model, path, head="required")
    labels = labels_for(model.num_classes, candidate_labels)
    processor = image_processor or ViTImageProcessor.of(model.config)
    return ImageClassificationPipeline(model, labels, processor, target, precision, batch_size)
