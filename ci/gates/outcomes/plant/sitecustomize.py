"""On the PYTHONPATH of a demo: one fault of learning, in the process of the script that PLANTED_SCRIPT names.

PLANTED_ARGUMENTS, a JSON list, goes to the end of its command line; PLANTED_PATCH names a function of this file.
`ci/gates/outcomes/planted.py` sets them.
"""

import json
import os
import sys
from pathlib import Path


def masks_ignored() -> None:
    """BEiT v2's masked patches stay visible: the encoder is to name tokens of what it sees."""
    from beit2.model.masked_image_model import MaskedImageModel

    whole = MaskedImageModel.forward_features
    MaskedImageModel.forward_features = lambda model, images, masked=None, patches=None: whole(
        model, images, None, patches
    )


def picture_masks_ignored() -> None:
    """Likewise of data2vec's pictures."""
    import torch

    from data2vec.model.vision_model import Data2VecVision

    whole = Data2VecVision.forward
    Data2VecVision.forward = lambda model, images, mask, rows: whole(model, images, torch.zeros_like(mask), rows)


if Path(getattr(sys, "argv", [""])[0]).name == os.environ.get("PLANTED_SCRIPT"):
    sys.argv += json.loads(os.environ["PLANTED_ARGUMENTS"])
    if patch := os.environ.get("PLANTED_PATCH"):
        project = str(Path(sys.argv[0]).resolve().parent)  # which Python adds after this file
        sys.path.insert(0, project)
        globals()[patch]()
        sys.path.remove(project)
