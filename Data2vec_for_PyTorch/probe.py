"""Do representations improve over training? A linear probe and a cloze retrieval on held-out text or images.

    python probe.py --config-dir configs/text/pretraining --config-name base task.data=DIR \
        common_eval.path=checkpoint_best.pt

On text, both look at masked tokens only, whose identity the model has to infer from context, and are computed for the
untrained model (same seed) and for the checkpoint:

- linear probe: a ridge-regression classifier from the student's hidden state to the token (the most frequent ones),
  fitted on the training split, accuracy on the validation split; beside it, that of always guessing the commonest;
- cloze retrieval: how often the teacher's target nearest to a prediction, among all masked tokens looked at, is the one
  of the predicted position; beside it, chance.

On images (class folders in task.data/<train_subset> and <valid_subset>) the linear probe goes from the student's
patches, averaged, to the picture's class; beside it, that of always guessing the largest class. The cloze retrieval is
over masked patches.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from common import device as devices
from common import distributed
from common.checkpoint_file import CheckpointError, load
from common.errors import UsageError, print_usage_errors
from data2vec.command_line import choose_precision, parse
from data2vec.data.dictionary import MASK
from data2vec.data.epochs import EpochBatches
from data2vec.data.pretraining_data import PretrainingData
from data2vec.modality import build, forward_of, is_vision, open_data
from data2vec.training.checkpoint import load_weights

TRAIN_TOKENS, VALID_TOKENS, RETRIEVAL_TOKENS = 8000, 4000, 1000
CLASSES = 100
RIDGE = 1e-2


@print_usage_errors
def main(argv: list[str] | None = None) -> dict[str, dict[str, float]]:
    options, config, _ = parse(argv, __doc__.splitlines()[0])
    path = config.common_eval.path
    if not path:
        raise UsageError("common_eval.path is not set: give the checkpoint, common_eval.path=FILE")
    with distributed.process_group(options.device) as world:
        precision, _ = choose_precision(options, config, world.device)
        data = open_data(config)
        results = {}
        for name in ("untrained", "checkpoint"):
            devices.seed_everything(config.common.seed)
            model = build(config, data)
            if name == "checkpoint":
                try:
                    load_weights(model, load(path), path)
                except CheckpointError as error:
                    raise UsageError(str(error)) from None
            probe = probe_images if is_vision(config) else probe_text
            results[name] = probe(model.to(world.device).eval(), data, config, world.device, precision)
    print_table(results, "images" if is_vision(config) else "text")
    return results


def probe_images(model, data, config, device: torch.device, precision: str) -> dict[str, float]:
    """All numbers of one image model, in percent."""
    from data2vec.image_probe import (  # torchvision: text does without
        class_folders,
        collect_masked_patches,
        collect_pictures,
    )

    train_folder, valid_folder, classes = class_folders(config)
    train = collect_pictures(model, train_folder, classes, config, device, precision)
    valid = collect_pictures(model, valid_folder, classes, config, device, precision)
    accuracy, largest = linear_probe(*train, *valid)
    batches, forward = data.valid_batches(config.dataset.valid_subset), forward_of(config, data, device)
    pred, target = collect_masked_patches(model, batches, RETRIEVAL_TOKENS, forward, device, precision)
    return {
        "linear probe": accuracy,
        "largest class": largest,
        "cloze retrieval": retrieval(pred, target),
        "chance": 100 / len(pred),
    }


def probe_text(model, data: PretrainingData, config, device: torch.device, precision: str) -> dict[str, float]:
    """All numbers of one text model, in percent."""
    train = collect(model, data.train_batches(epoch=1), TRAIN_TOKENS, data, device, precision)
    valid = collect(model, data.valid_batches(config.dataset.valid_subset), VALID_TOKENS, data, device, precision)
    accuracy, commonest = linear_probe(train["hidden"], train["token"], valid["hidden"], valid["token"])
    pred, target = valid["pred"][:RETRIEVAL_TOKENS], valid["target"][:RETRIEVAL_TOKENS]
    return {
        "linear probe": accuracy,
        "commonest token": commonest,
        "cloze retrieval": retrieval(pred, target),
        "chance": 100 / len(pred),
    }


@torch.no_grad()
def collect(model, batches: EpochBatches, limit: int, data: PretrainingData, device, precision: str):
    """Hidden states, predictions, targets [N, C] and original ids [N] of the first `limit` masked tokens."""
    rows: dict[str, list[torch.Tensor]] = {"hidden": [], "pred": [], "target": [], "token": []}
    count = 0
    for batch in batches.loader(num_workers=0):
        batch = batch.to(device)
        with devices.autocast(device, precision):
            out = model(batch.src_tokens, batch.target_tokens, data.vocab.index(MASK), batch.plan)
            hidden = model.encoder.sentence_encoder(batch.src_tokens, batch.plan.has_padding, batch.plan.rows)
        tokens = batch.target_tokens.flatten()[batch.plan.rows.flat]
        for name, value in (("hidden", hidden), ("pred", out["pred"]), ("target", out["target"]), ("token", tokens)):
            rows[name].append(value.float().cpu() if name != "token" else value.cpu())
        count += len(tokens)
        if count >= limit:
            break
    return {name: torch.cat(values)[:limit] for name, values in rows.items()}


def linear_probe(
    train_x: torch.Tensor, train_y: torch.Tensor, valid_x: torch.Tensor, valid_y: torch.Tensor
) -> tuple[float, float]:
    """(accuracy of a ridge classifier, share of the commonest token), percent, over the CLASSES commonest tokens."""
    counts = torch.bincount(train_y)
    classes = counts.argsort(descending=True)[: min(CLASSES, int((counts > 0).sum()))]
    mean, std = train_x.mean(dim=0), train_x.std(dim=0) + 1e-6

    def prepare(x, y):
        kept = torch.isin(y, classes)
        x = (x[kept] - mean) / std
        y = (y[kept, None] == classes[None, :]).double()  # one-hot
        return torch.cat([x, torch.ones(len(x), 1)], dim=1).double(), y

    x, y = prepare(train_x, train_y)
    weights = torch.linalg.solve(x.T @ x + RIDGE * len(x) * torch.eye(x.shape[1]), x.T @ y)
    x, y = prepare(valid_x, valid_y)
    correct = (x @ weights).argmax(dim=1) == y.argmax(dim=1)
    return 100 * correct.double().mean().item(), 100 * y[:, 0].mean().item()


def retrieval(pred: torch.Tensor, target: torch.Tensor) -> float:
    """Recall@1 in percent by cosine similarity, both sides centred."""
    pred, target = (F.normalize(x - x.mean(dim=0), dim=1) for x in (pred, target))
    nearest = (pred @ target.T).argmax(dim=1)
    return 100 * (nearest == torch.arange(len(pred))).double().mean().item()


def print_table(results: dict[str, dict[str, float]], what: str) -> None:
    print(f"{f'on held-out {what}, %':22}" + "".join(f"{name:>12}" for name in results))
    for key in next(iter(results.values())):
        print(f"{key:22}" + "".join(f"{values[key]:12.2f}" for values in results.values()), flush=True)


if __name__ == "__main__":
    main()
