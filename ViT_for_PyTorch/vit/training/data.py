"""The data of a configured run: folders checked before anything is built, loaders, the endless stream of batches."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

from common.device import pins_memory
from common.distributed import World
from common.errors import UsageError
from vit.config.run_config import Config
from vit.data.augment import EvalTransform, TrainTransform
from vit.data.image_folder import ImageFolder, scan, scan_both
from vit.data.loader import Batch, EvalLoader, TrainLoader
from vit.model.vision_transformer import ViTConfig


@dataclass(frozen=True)
class Data:
    """Class names and loaders; a loader is None where the run has no use for it."""

    class_names: list[str]
    training: TrainLoader | None
    evaluation: EvalLoader | None


def open_training_data(config: Config, model: ViTConfig, world: World) -> Data:
    """Loaders of the training folder and, with `do_eval`, of the evaluation folder, for a model's picture size.

    Raises:
        UsageError: a folder is missing or malformed, the class lists differ, `do_eval` without an evaluation folder, or
            `model.num_classes` contradicts the folder.
    """
    options = config.data
    evaluation = None
    if config.do_eval:
        if not options.eval_dataset_dir:
            raise UsageError("--eval_dataset_dir is not given: give it, or switch evaluation off with do_eval=false")
        folder, evaluation_folder = scan_both(options.train_dataset_dir, options.eval_dataset_dir)
        evaluation = evaluation_loader(config, model, world, evaluation_folder)
    else:
        folder = scan(options.train_dataset_dir)
    _check_classes(config, folder)
    transform = TrainTransform(model.image_size, options)
    training = TrainLoader(
        folder,
        transform,
        batch_size=config.batch_size,
        seed=config.seed,
        rank=world.rank,
        world_size=world.size,
        num_workers=options.num_workers,
        pin_memory=pins_memory(world.device),
    )
    return Data(folder.classes, training, evaluation)


def evaluation_loader(config: Config, model: ViTConfig, world: World, folder: ImageFolder) -> EvalLoader:
    """This rank's share of a folder's pictures, prepared for a model as evaluation does it."""
    return EvalLoader(
        folder,
        EvalTransform.of(model),
        batch_size=config.batch_size,
        rank=world.rank,
        world_size=world.size,
        num_workers=config.data.num_workers,
        pin_memory=pins_memory(world.device),
    )


def _check_classes(config: Config, folder: ImageFolder) -> None:
    if len(folder.classes) == 1:
        raise UsageError(
            f"{folder.root} has one class folder, {folder.classes[0]}: nothing to tell apart; give a folder of several"
        )
    if config.metric_for_best == "top5" and config.do_eval and len(folder.classes) <= 5:
        raise UsageError(
            f"metric_for_best=top5 is always 100 % of the {len(folder.classes)} classes of {folder.root}: choose top1 "
            "or loss"
        )
    if config.model.num_classes not in (0, len(folder.classes)):
        raise UsageError(
            f"model.num_classes={config.model.num_classes}, but {folder.root} has {len(folder.classes)} class folders; "
            "leave it out to take the folder's"
        )


def training_batches(loader: TrainLoader, accumulate: int, first_step: int) -> Iterator[Batch]:
    """Micro-batches without end from optimizer step `first_step` on; an epoch has whole optimizer steps only."""
    steps_per_epoch = loader.steps_per_epoch // accumulate
    epoch, step = divmod(first_step, steps_per_epoch)
    while True:
        yield from islice(loader.epoch(epoch, step * accumulate), (steps_per_epoch - step) * accumulate)
        epoch, step = epoch + 1, 0
