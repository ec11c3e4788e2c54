"""Pictures and batches under the name that scripts outside import; the code is in `data/`."""

from beit2.data.batches import EpochBatches, run_batches, steps_per_epoch
from beit2.data.images import Batch, PretrainingImages, collate
from beit2.data.listing import EXTENSIONS
from beit2.data.listing import list_pictures as find_images
from beit2.data.normalizer import Normalizer
from beit2.data.reading import check_images, read_image

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
