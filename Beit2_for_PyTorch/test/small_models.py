"""Registers models small enough for tests under names of their own; run as a script, starts entry scripts with them:

python small_models.py run_beitv2_pretraining.py --model beit_test_cls_pt ... [--then run_vqkd_training.py ...]
"""

import contextlib
import runpy
import sys
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(PROJECT.parent), str(PROJECT)]

from beit2.model import names as model_names  # noqa: E402
from common import distributed  # noqa: E402

SHAPE = {"embed_dim": 32, "depth": 4, "num_heads": 2, "patch_size": 8}
model_names.PRETRAINING_MODELS["beit_test_cls_pt"] = SHAPE | {"cls_pt": True}
model_names.PRETRAINING_MODELS["beit_test"] = SHAPE | {"cls_pt": False}
model_names.FINETUNING_MODELS["beit_test_classifier"] = SHAPE
model_names.FINETUNING_MODELS["beit_test_encoder"] = SHAPE | {"depth": 1}  # the small tokenizer's
model_names.TOKENIZERS["vqkd_test_clip"] = {"dim": 32, "depth": 1, "heads": 2, "patch_size": 8, "decoder_depth": 1}
# what makes run_beitv2_pretraining.py use them
OPTIONS = (
    "--input_size 32 --second_input_size 32 --second_interpolation bicubic --tokenizer_model vqkd_test_clip "
    "--codebook_size 32 --codebook_dim 8 --num_mask_patches 6 --min_mask_patches_per_block 2 --early_layers 2 "
    "--head_layers 1 --batch_size 4 --warmup_epochs 1 --clip_grad 3.0 --num_workers 0 --device cpu --log_every 1"
).split()

if __name__ == "__main__":
    runs = [[]]
    for argument in sys.argv[1:]:
        runs.append([]) if argument == "--then" else runs[-1].append(argument)
    # one group for all: a second one under the same torchrun would wait for the first one's store for ever
    with distributed.process_group("cpu") as world:
        distributed.process_group = lambda *_, **__: contextlib.nullcontext(world)
        for sys.argv in runs:
            runpy.run_path(str(PROJECT / sys.argv[0]), run_name="__main__")
