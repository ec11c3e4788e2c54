"""Zero-shot classification of an image folder: a class is the mean of its name in many prompts.

arXiv:2103.00020, section 3.1.4.
"""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from clip_pretraining.evaluation import Encoder
from clip_pretraining.pairs import DecodedImages, ImageRef
from clip_pretraining.sources import IMAGE_SUFFIXES
from clip_pretraining.tokenization import PackedCaptions
from common.device import UsageError

IMAGENET_TEMPLATES = Path(__file__).with_name("imagenet_templates.txt")  # the 80 of openai/CLIP


def evaluate_folder(
    encoder: Encoder,
    tokenizer: PreTrainedTokenizerBase,
    folder: str | Path,
    class_names_file: str | Path | None = None,
    templates_file: str | Path | None = None,
) -> dict[str, float]:
    """Top-1 and top-5 accuracy in 0..1 of `folder`/CLASS/PICTURE.

    Args:
        class_names_file: one name a line in the order of the sorted class folders; default the folders' names, with
            spaces for underscores.
        templates_file: one prompt a line with {} for the name; default the 80 ImageNet prompts.

    Returns:
        zero_shot_top1, zero_shot_top5, zero_shot_images, zero_shot_classes
    """
    classes, images, labels = list_folder(Path(folder))
    names = read_class_names(class_names_file, classes)
    templates = read_templates(templates_file or IMAGENET_TEMPLATES)
    was_training = encoder.model.training
    encoder.model.eval()
    try:
        weights = class_features(encoder, tokenizer, names, templates)  # [C, d]
        features = encoder.images(DecodedImages(images, encoder.settings.size))  # [I, d]
    finally:
        encoder.model.train(was_training)
    order = (features @ weights.T).topk(min(5, len(classes)), dim=1).indices.cpu()  # [I, 5]
    hit = order == torch.tensor(labels)[:, None]
    return {
        "zero_shot_top1": float(hit[:, 0].double().mean()),
        "zero_shot_top5": float(hit.any(1).double().mean()),
        "zero_shot_images": len(images),
        "zero_shot_classes": len(classes),
    }


def class_features(
    encoder: Encoder, tokenizer: PreTrainedTokenizerBase, names: list[str], templates: list[str]
) -> torch.Tensor:
    """L2-normalised [C, d]: the mean over the prompts of each class's normalised text features."""
    prompts = [template.replace("{}", name) for name in names for template in templates]
    features = encoder.texts(PackedCaptions.tokenise(prompts, tokenizer, encoder.max_length))  # [C * templates, d]
    mean = features.view(len(names), len(templates), -1).mean(1)  # [C, d]
    return torch.nn.functional.normalize(mean, dim=-1)


def list_folder(folder: Path) -> tuple[list[str], list[ImageRef], list[int]]:
    """Class folders in sorted order, their pictures, and the class of each picture."""
    classes = sorted(p.name for p in folder.iterdir() if p.is_dir())
    images: list[ImageRef] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        for path in sorted((folder / name).iterdir()):
            if path.suffix.lower().lstrip(".") in IMAGE_SUFFIXES:
                images.append(ImageRef(str(path)))
                labels.append(label)
    if len(classes) < 2 or not images:
        raise UsageError(f"--zero_shot_dir {folder}: needs at least two class folders with pictures")
    return classes, images, labels


def read_class_names(file: str | Path | None, classes: list[str]) -> list[str]:
    if file is None:
        return [name.replace("_", " ") for name in classes]
    names = _lines(file)
    if len(names) != len(classes):
        raise UsageError(f"--class_names {file}: {len(names)} names for {len(classes)} class folders")
    return names


def read_templates(file: str | Path) -> list[str]:
    """Prompts, each with {} where the class name goes."""
    templates = _lines(file)
    wrong = [template for template in templates if "{}" not in template]
    if wrong or not templates:
        raise UsageError(
            f"--templates {file}: every line needs {{}} for the class name{f': {wrong[0]!r}' if wrong else ''}"
        )
    return templates


def _lines(file: str | Path) -> list[str]:
    return [line.strip() for line in Path(file).read_text(encoding="utf-8").splitlines() if line.strip()]
