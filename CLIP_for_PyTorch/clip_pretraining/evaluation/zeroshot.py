"""Zero-shot classification of an image folder: a class is the mean of its name in many prompts.

arXiv:2103.00020, section 3.1.4.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from clip_pretraining.data.pairs import DecodedImages, ImageRef
from clip_pretraining.data.picture_check import IMAGE_SUFFIXES
from clip_pretraining.data.tokenization import PackedCaptions, clean_caption
from clip_pretraining.evaluation.encoder import Encoder
from common.errors import UsageError

IMAGENET_TEMPLATES = Path(__file__).with_name("imagenet_templates.txt")  # the 80 of openai/CLIP


@dataclass(frozen=True)
class Task:
    """Pictures with their classes, and the classes in words."""

    images: list[ImageRef]
    labels: list[int]  # of each picture, its row in `prompts`
    prompts: list[list[str]]  # of each class, its name in every template


def read_task(
    folder: str | Path,
    class_names_file: str | Path | None = None,
    templates_file: str | Path | None = None,
    clean: bool = False,
) -> Task:
    """The pictures of `folder`/CLASS/PICTURE and their classes' prompts.

    Args:
        class_names_file: one name a line in the order of the sorted class folders; default the folders' names, with
            spaces for underscores.
        templates_file: one prompt a line with {} for the name; default the 80 ImageNet prompts.
        clean: pass the prompts through OpenAI's cleaning, as the captions of training.

    Raises:
        UsageError: no classes, another number of names, or a prompt without {}.
    """
    classes, images, labels = list_folder(Path(folder))
    templates = read_templates(templates_file or IMAGENET_TEMPLATES)
    prompts = [
        [template.replace("{}", name) for template in templates] for name in read_class_names(class_names_file, classes)
    ]
    if clean:
        prompts = [[clean_caption(prompt) for prompt in row] for row in prompts]
    return Task(images, labels, prompts)


def evaluate(encoder: Encoder, tokenizer: PreTrainedTokenizerBase, task: Task) -> dict[str, float]:
    """Top-1 and top-5 accuracy in 0..1: zero_shot_top1, zero_shot_top5, zero_shot_images, zero_shot_classes."""
    was_training = encoder.model.training
    encoder.model.eval()
    try:
        weights = class_features(encoder, tokenizer, task.prompts)  # [C, d]
        features = encoder.images(DecodedImages(task.images, encoder.settings.size))  # [I, d]
    finally:
        encoder.model.train(was_training)
    classes = len(task.prompts)
    order = (features @ weights.T).topk(min(5, classes), dim=1).indices.cpu()  # [I, 5]
    hit = order == torch.tensor(task.labels)[:, None]
    return {
        "zero_shot_top1": float(hit[:, 0].double().mean()),
        "zero_shot_top5": float(hit.any(1).double().mean()),
        "zero_shot_images": len(task.images),
        "zero_shot_classes": classes,
    }


def class_features(encoder: Encoder, tokenizer: PreTrainedTokenizerBase, prompts: list[list[str]]) -> torch.Tensor:
    """L2-normalised [C, d]: the mean over the prompts of each class's normalised text features."""
    tokens = PackedCaptions.tokenise([prompt for row in prompts for prompt in row], tokenizer, encoder.max_length)
    features = encoder.texts(tokens)  # [C * templates, d]
    mean = features.view(len(prompts), len(prompts[0]), -1).mean(1)  # [C, d]
    return torch.nn.functional.normalize(mean, dim=-1)


def list_folder(folder: Path) -> tuple[list[str], list[ImageRef], list[int]]:
    """Class folders in sorted order, their pictures, and the class of each picture."""
    classes = sorted(p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
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
        raise UsageError(
            f"--class_names {file}: {len(names)} names for {len(classes)} class folders: give one a folder"
        )
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
    try:
        return [line.strip() for line in Path(file).read_text(encoding="utf-8").splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise UsageError(f"{file}: not UTF-8 text ({error})") from None
