"""Class names: ImageNet's from timm's data, a training run's own from a file beside its checkpoint."""

import json
from collections.abc import Sequence
from pathlib import Path

from timm.data import ImageNetInfo

from vit.weights import hub_files

CLASS_NAMES_FILE = "class_names.json"


def imagenet_labels() -> list[str]:
    """The 1000 ImageNet-1k names in class order, the first synonym of each ('crane' and 'maillot' occur twice)."""
    info = ImageNetInfo("imagenet-1k")
    return [info.index_to_description(index).split(",")[0] for index in range(info.num_classes())]


def save_class_names(folder: str | Path, names: Sequence[str]) -> Path:
    """Writes the class names of a run, in class order, to `folder`/class_names.json."""
    path = Path(folder) / CLASS_NAMES_FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(list(names), ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    part.replace(path)
    return path


def load_class_names(checkpoint: str | Path) -> list[str] | None:
    """The names saved beside a checkpoint (or in that folder itself); None when there are none.

    ValueError naming the file when it is not a JSON list of strings.
    """
    if Path(checkpoint).is_dir() and (names := hub_files.labels(Path(checkpoint))):
        return names
    path = Path(checkpoint) / CLASS_NAMES_FILE
    if not path.is_file():
        path = Path(checkpoint).parent / CLASS_NAMES_FILE
    if not path.is_file():
        return None
    try:
        names = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{path}: must be a JSON list of class names, in class order")
    return names


def labels_for(num_classes: int, names: Sequence[str] | None = None) -> list[str]:
    """One label per logit: the given names, else ImageNet's for a 1000-class head, else "class_0", "class_1", ...

    ValueError when `names` has another length than the head: a shifted label is worse than none.
    """
    if names is not None:
        if len(names) != num_classes:
            raise ValueError(f"{len(names)} class names for a head of {num_classes} classes")
        return list(names)
    if num_classes == 1000:
        return imagenet_labels()
    return [f"class_{index}" for index in range(num_classes)]
