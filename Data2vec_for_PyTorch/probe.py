"""Do representations improve over training? Probes and a cloze retrieval on held-out text or images.

    python probe.py --config-dir configs/text/pretraining --config-name base task.data=DIR \
        common_eval.path=checkpoint_best.pt

On text, all look at masked tokens only, whose identity the model has to infer from context, and are computed for the
untrained model (same seed) and for the checkpoint:

- linear probe: a logistic regression from the last three layers' states (of data2vec 2.0 the decoder's), side by side,
  to the token (the 100 commonest, <s> and </s> left out), fitted on the training split, accuracy on the validation
  split; of the student, and of the teacher, which is given the masked text, too (not of data2vec 2.0, whose teacher
  knows whole texts alone); beside it, that of always guessing the commonest, and on the same tokens that of tables
  which count in the training text what stands between the neighbours, one on each side, or two;
- cloze retrieval: how often the teacher's target nearest to a prediction, among all masked tokens looked at, is the one
  of the predicted position; beside it, chance.

On images (class folders in task.data/<train_subset> and <valid_subset>) a linear probe (ridge regression) and the
nearest neighbour go from the student's patches, averaged in 3 x 3 cells, to the picture's class; beside them the same
from raw pixels (12 x 12), and always guessing the largest class. The cloze retrieval is over masked patches.
"""

from __future__ import annotations

import common.requirements

import torch

from common import device as devices
from common import distributed
from common.errors import print_usage_errors
from data2vec import device_patches
from data2vec.classifiers import commonest, linear_probe, logistic_probe, nearest_neighbour, retrieval
from data2vec.command_line import choose_precision, parse_evaluation
from data2vec.data.pretraining_data import PretrainingData
from data2vec.modality import build, forward_of, is_vision, load_checkpoint, open_data
from data2vec.text_probe import collect, counting_accuracy

TRAIN_TOKENS, VALID_TOKENS, RETRIEVAL_TOKENS = 60_000, 15_000, 1000
CLASSES = 100
OF_PIXELS, OF_COUNTING = ("linear probe, pixels", "nearest, pixels"), ("count table", "count table of four")
Numbers = dict[str, float]


@print_usage_errors
def main(argv: list[str] | None = None) -> dict[str, Numbers]:
    options, config, notes, checkpoint = parse_evaluation(argv, __doc__.splitlines()[0])
    print("\n".join(notes))
    with distributed.process_group(options.device) as world:
        precision, _ = choose_precision(options, config, world.device)
        data = open_data(config)
        results = {}
        for name in ("untrained", "checkpoint"):
            devices.seed_everything(config.common.seed)
            model = build(config, data)
            if name == "checkpoint":
                load_checkpoint(model, checkpoint, config.common_eval.path, config, data)
            model.to(world.device).eval()
            device_patches.apply_to_model(model, world.device)
            probe = probe_images if is_vision(config) else probe_text
            results[name] = probe(model, data, config, world.device, precision, results.get("untrained"))
    print_table(results, "images" if is_vision(config) else "text")
    return results


def probe_images(model, data, config, device: torch.device, precision: str, earlier: Numbers | None) -> Numbers:
    """All numbers of one image model, in percent; what `earlier` says of the pixels alone is not measured again."""
    from data2vec.image_probe import (  # torchvision: text does without
        class_folders,
        collect_masked_patches,
        collect_pictures,
        collect_pixels,
    )

    train_folder, valid_folder, classes = class_folders(config)
    train = collect_pictures(model, train_folder, classes, config, device, precision)
    valid = collect_pictures(model, valid_folder, classes, config, device, precision)
    if earlier:
        known = {name: earlier[name] for name in OF_PIXELS}
    else:
        pixels = collect_pixels(train_folder), train[1], collect_pixels(valid_folder), valid[1]
        known = dict(zip(OF_PIXELS, (linear_probe(*pixels)[0], nearest_neighbour(*pixels)), strict=True))
    accuracy, largest = linear_probe(*train, *valid)
    batches, forward = data.valid_batches(config.dataset.valid_subset), forward_of(config, data, device)
    pred, target = collect_masked_patches(model, batches, RETRIEVAL_TOKENS, forward, device, precision)
    return {
        "linear probe": accuracy,
        "nearest neighbour": nearest_neighbour(*train, *valid),
        **known,
        "largest class": largest,
        "cloze retrieval": retrieval(pred, target),
        "chance": 100 / len(pred),
    }


def probe_text(
    model, data: PretrainingData, config, device: torch.device, precision: str, earlier: Numbers | None
) -> Numbers:
    """All numbers of one text model, in percent; what counting knows, `earlier` may say already."""
    train = collect(model, data.train_batches(epoch=1), TRAIN_TOKENS, data, device, precision)
    valid = collect(model, data.valid_batches(config.dataset.valid_subset), VALID_TOKENS, data, device, precision)
    accuracy, guessing = logistic_probe(train["student"], train["token"], valid["student"], valid["token"], CLASSES)
    teacher = {}
    if "teacher" in train:
        pairs = (train["teacher"], train["token"], valid["teacher"], valid["token"])
        teacher = {"teacher's probe": logistic_probe(*pairs, CLASSES)[0]}
    if earlier:
        known = {name: earlier[name] for name in OF_COUNTING}
    else:
        corpus = data.split(config.dataset.train_subset, training=True)[0].corpus
        text = corpus.token_range(0, int(corpus.sizes.sum()))
        counted = counting_accuracy(text, commonest(train["token"], CLASSES), valid)
        known = dict(zip(OF_COUNTING, counted, strict=True))
    pred, target = valid["pred"][:RETRIEVAL_TOKENS], valid["target"][:RETRIEVAL_TOKENS]
    return {
        "linear probe": accuracy,
        **teacher,
        "commonest token": guessing,
        **known,
        "cloze retrieval": retrieval(pred, target),
        "chance": 100 / len(pred),
    }


def print_table(results: dict[str, dict[str, float]], what: str) -> None:
    print(f"{f'on held-out {what}, %':22}" + "".join(f"{name:>12}" for name in results))
    for key in next(iter(results.values())):
        print(f"{key:22}" + "".join(f"{values[key]:12.2f}" for values in results.values()), flush=True)


if __name__ == "__main__":
    main()
