"""Pictures and batches under the name that scripts outside import; the code is in `data/`."""

from beit2.data.batches import EpochBatches, run_batches, steps_per_epoch
from beit2.data.images import (
    EXTENSIONS,
    Batch,
    PretrainingImages,
    check_images,
    collate,
    find_images,
    read_image,
)
from beit2.data.normalizer import Normalizer

__all__ = [
    "EXTENSIONS",
    "Batch",
    "EpochBatches",
    "Normalizer",
    "PretrainingImages",
    "check_images",
    "collate",
    "find_images",
    "read_image",
    "run_batches",
    "steps_per_epoch",
]
