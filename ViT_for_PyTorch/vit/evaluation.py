"""Evaluation of a checkpoint: its classifier (eval), its features by nearest neighbours (knn), or a new linear one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from common.distributed import World, process_group
from common.errors import UsageError
from common.run.progress import bar
from common.run_log import RunLog
from vit.config.description import config_of_run
from vit.config.run_config import Config
from vit.data import class_identity
from vit.data.image_folder import ImageFolder, scan, scan_both
from vit.data.loader import Batch
from vit.model.vision_transformer import ViTConfig
from vit.preparation import build, local_checkpoint
from vit.training import class_report, probes
from vit.training.class_report import ClassTally
from vit.training.data import evaluation_loader
from vit.training.evaluate import Score, evaluate_model
from vit.weights import download
from vit.weights.labels import load_class_names
from vit.weights.loading import read_state_dict

NETWORK = "ViT_for_PyTorch"
METHODS = ("eval", "knn", "linear")


def evaluate(config: Config, method: str = "eval") -> dict[str, Any]:
    """Scores `config.load_checkpoint` on the evaluation folder, into `config.output_dir`.

    Beside the result file: `evaluation.json` with a line a class and the confusion matrix, and `confusion.png`; of knn
    and linear `knn.json`, `knn_confusion.png` and so on.

    Args:
        method: eval counts what the checkpoint's own classifier says; knn and linear know the training folder's
            pictures by the backbone's features alone (`probes`), of any checkpoint, also without a classifier.

    Returns:
        Counts, percentages and the mean loss: the keys of the result file.
    """
    with process_group(config.device) as world:
        weights = local_checkpoint(config.load_checkpoint, world)
        description = config_of_run(config, weights, training=False, pooling=method != "eval")
        prepare = _own_classifier if method == "eval" else _features
        score_into = prepare(config, description, weights, world, method)
        # evaluation: adds to a folder and moves nothing of a training run aside
        with RunLog(
            config.output_dir,
            world,
            f"{NETWORK}_{method}",
            config.batch_size,
            config.case_kind,
            evaluation=True,
            skip_steps=1,
            profile=config.profile,
        ) as log:
            score, tally, names = score_into(log)
            log.info(f"ViT: Top1 Accuracy = {{'Top1 Accuracy': {score.top1 / score.count}}}; {score}")
            keys = {"Top1": score.top1, "Top5": score.top5, "Count": score.count, "Top5Accuracy": score.top5_percent}
            if tally is not None:
                keys |= {"MeanClassAccuracy": tally.mean_class_accuracy}
                if world.is_main:
                    log.info(class_report.write(Path(config.output_dir), method, names, tally, score))
            of = "top-1 of held-out pictures, %"
            return log.finish(accuracy=score.top1_percent, loss=score.loss, AccuracyIs=of, **keys)


Scored = tuple[Score, ClassTally | None, list[str]]  # with the class names


def _own_classifier(
    config: Config, description: ViTConfig, weights: Path, world: World, method: str
) -> Callable[[RunLog], Scored]:
    """Checks the classes and builds the model; what is returned scores it."""
    if config.model.num_classes not in (0, description.num_classes):
        raise UsageError(
            f"model.num_classes={config.model.num_classes}, but {weights} has {description.num_classes} classes: "
            "leave it out"
        )
    if "head.weight" not in read_state_dict(weights):
        raise UsageError(f"{weights}: has no classifier to evaluate: fine-tune it, or see its features, --run_mode knn")
    folder = scan(config.data.eval_dataset_dir)
    is_published = config.load_checkpoint.removeprefix("mindspore/") in download.PUBLISHED
    names = None if is_published else load_class_names(weights)
    match = class_identity.match(folder, description.num_classes, names, config.load_checkpoint, is_published)
    model = build(config, description, weights, world, head="required")
    pictures = replace(folder, classes=match.names, targets=[match.of_folder[target] for target in folder.targets])

    def score(log: RunLog) -> Scored:
        log.info(match.note)
        loader = evaluation_loader(config, description, world, pictures)
        tally = ClassTally.of(description.num_classes, world.device)
        return evaluate_model(model, counted(loader, log, world), world, config.precision, tally), tally, match.names

    return score


def _features(
    config: Config, description: ViTConfig, weights: Path, world: World, method: str
) -> Callable[[RunLog], Scored]:
    """Checks the folders and builds the model; what is returned scores its features."""
    known, asked = scan_both(config.data.train_dataset_dir, config.data.eval_dataset_dir)
    model = build(config, description, weights, world, head="new").eval()

    def of(folder: ImageFolder, log: RunLog) -> probes.Features:
        batches = counted(evaluation_loader(config, description, world, folder), log, world)
        return probes.features(model, batches, world, config.precision)

    def score(log: RunLog) -> Scored:
        log.info(
            f"features of {description.embed_dim} numbers, global_pool={description.global_pool}, of {len(known)} "
            f"known and {len(asked)} asked pictures"
        )
        own, everyones = of(known, log), probes.of_all_ranks(of(asked, log), world)
        if method == "knn":
            logits, note = probes.nearest_neighbours(own, everyones, len(known.classes), config.knn, world)
        else:
            logits, note = probes.linear(own, everyones, len(known.classes), world)
        log.info(note)
        return *probes.score(logits, everyones, with_loss=method == "linear"), known.classes

    return score


def counted(batches: Iterable[Batch], log: RunLog, world: World) -> Iterator[Batch]:
    """Counts evaluated pictures of all ranks in FPS, with a bar; shares differ by less than a batch."""
    for batch in bar(batches, "evaluate"):
        yield batch
        log.count(len(batch.targets) * world.size)
