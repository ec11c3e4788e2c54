"""Draws pictures, masked inputs and what the predicted visual tokens stand for (the mean patch of each); scores them.

python draw_predictions.py --checkpoint output/checkpoint.pth --tokenizer_weight FILE --data_path DIR
"""

from __future__ import annotations

import common.requirements

import argparse
from pathlib import Path

import torch

from beit2 import pretraining_options as setup
from beit2.image_data import Normalizer, collate
from beit2.options import mean_and_std
from beit2.prediction_figure import ROWS, check_figure, code_patches, prediction_rows
from beit2.token_accuracy import token_accuracy
from beit2.training.checkpoints import load_model
from beit2.weights.files import read_checkpoint
from common import device as devices
from common.errors import print_usage_errors
from common.run.figures import picture_rows


@print_usage_errors
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser("draw_predictions.py", description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, required=True, help="checkpoint of run_beitv2_pretraining.py")
    parser.add_argument("--tokenizer_weight", required=True)
    parser.add_argument("--data_path", required=True)
    parser.add_argument("--output", type=Path, default=Path("predictions.png"))
    parser.add_argument("--count", type=int, default=8, help="pictures to draw")
    parser.add_argument("--score_count", type=int, default=512, help="pictures whose masked tokens are scored")
    options = parser.parse_args(argv)
    for name in ("count", "score_count"):
        if getattr(options, name) < 1:
            raise devices.UsageError(f"--{name} {getattr(options, name)}: must be at least 1")
    check_figure(options.output, "--output")

    checkpoint = read_checkpoint(options.checkpoint)
    if "args" not in checkpoint:
        raise devices.UsageError(
            f"{options.checkpoint}: not written by run_beitv2_pretraining.py (no args in it); give one that is"
        )
    trained = setup.read_options([])  # for what the reference's checkpoints do not have
    vars(trained).update(vars(checkpoint["args"]))
    trained.random_tokenizer = False
    trained.tokenizer_weight, trained.data_path = options.tokenizer_weight, options.data_path
    model = setup.build_model(trained).eval()
    load_model(model, checkpoint["model"], options.checkpoint)
    tokenizer = setup.load_tokenizer(trained, "fp32", model.window_size)
    dataset = setup.build_dataset(trained, model.window_size)
    batch = collate([dataset[(0, index)] for index in evenly(len(dataset), options.count)])
    normalizer = Normalizer(*mean_and_std(trained), torch.device("cpu"))
    normalized, visual = normalizer.views(batch)
    scored = evenly(len(dataset), options.score_count)
    patches = code_patches(tokenizer, normalizer.views(collate([dataset[(0, index)] for index in scored]))[1])
    unit = normalizer.unit(batch.views)
    rows = prediction_rows(model, tokenizer, unit, normalized, visual, batch.mask, patches)
    picture_rows(rows, ROWS, options.output, batch.mask.numpy())
    print(f"drawn: {options.output}")
    score = token_accuracy(model, tokenizer, dataset, scored, normalizer)
    print(f"masked tokens predicted right: {score.predicted:.2f} %; their commonest token: {score.commonest:.2f} %")


def evenly(length: int, count: int) -> list[int]:
    """At most `count` numbers below `length`, evenly apart."""
    return list(range(0, length, max(1, length // count)))[:count]


if __name__ == "__main__":
    main()
