"""Which class of a model's head each folder of pictures is: by name wherever there are names, never by chance."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from timm.data import ImageNetInfo

from common.errors import UsageError
from vit.data.image_folder import ImageFolder

IMAGENET_CLASSES = 1000


@dataclass(frozen=True)
class Match:
    """The head's class names, the head's index of each folder's class, and a sentence on how they were found."""

    names: list[str]
    of_folder: list[int]
    note: str


def match(
    folder: ImageFolder, num_classes: int, names: Sequence[str] | None, checkpoint: str, is_imagenet: bool = False
) -> Match:
    """Finds the folder's classes among the head's; a folder may have some of them only.

    Args:
        num_classes: of the head.
        names: of the head's classes, where the checkpoint has them.
        checkpoint: for messages.
        is_imagenet: published weights, whose classes are ImageNet's.

    Raises:
        UsageError: a folder that is none of the head's classes, or no names and another number of classes.
    """
    imagenet = _imagenet() if num_classes == IMAGENET_CLASSES else []
    if names is None and (is_imagenet or _all_in(folder.classes, imagenet)):
        names = [ids[1] for ids in imagenet]  # the first
    if names is None:
        if num_classes != len(folder.classes):
            raise UsageError(
                f"{checkpoint}: its head has {num_classes} classes without names, {folder.root} has "
                f"{len(folder.classes)} class folders: the classes cannot be told; give a folder of as many classes"
            )
        order = list(range(num_classes))
        return Match(folder.classes, order, f"{checkpoint} names no classes: the folders are taken in sorted order")
    known = {name: index for index, name in enumerate(names) if names.count(name) == 1}
    if len(names) == len(imagenet) and all(name in ids for name, ids in zip(names, imagenet, strict=True)):
        known = _aliases(imagenet)
    strangers = [name for name in folder.classes if name not in known]
    if strangers:
        some, all_known = _shortened(strangers), _shortened(names)
        raise UsageError(
            f"the class folders of {folder.root} are not the classes that {checkpoint} was trained on: "
            f"{some} ({len(strangers)} of {len(folder.classes)}) must be among {all_known} ({len(names)})"
        )
    of_folder = [known[name] for name in folder.classes]
    if len(set(of_folder)) < len(of_folder):
        twice = next(names[index] for index in of_folder if of_folder.count(index) > 1)
        raise UsageError(f"{folder.root}: two class folders mean the same class, {twice!r}: merge or rename one")
    return Match(list(names), of_folder, f"classes matched by name: {len(of_folder)} of the model's {len(names)}")


def _shortened(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (" ..." if len(names) > 3 else "")


def _imagenet() -> list[tuple[str, str, str]]:
    """Of every class in its order: its WordNet id, its first name, and all its names."""
    info = ImageNetInfo("imagenet-1k")
    described = [(info.index_to_label_name(i), info.index_to_description(i)) for i in range(info.num_classes())]
    return [(wordnet, text.split(",")[0], text) for wordnet, text in described]


def _aliases(imagenet: Sequence[tuple[str, str, str]]) -> dict[str, int]:
    """Index by whatever means one class only: 'crane' and 'maillot' are two classes each."""
    found: dict[str, set[int]] = {}
    for index, ids in enumerate(imagenet):
        for name in ids:
            found.setdefault(name, set()).add(index)
    return {name: indices.pop() for name, indices in found.items() if len(indices) == 1}


def _all_in(classes: Sequence[str], imagenet: Sequence[tuple[str, str, str]]) -> bool:
    return set(classes) <= _aliases(imagenet).keys()
