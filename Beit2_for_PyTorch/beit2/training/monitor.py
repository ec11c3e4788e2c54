"""--monitor_every: while a model is pretrained, what its frozen features are worth on labelled pictures.

The loss of pretraining says little about that. Nothing is drawn and nothing of the training changes: a run with a
monitor has the losses of one without.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Subset

from beit2.data.labelled import CentreCrop, LabelledImages, find_classes
from beit2.data.normalizer import Normalizer
from beit2.data.reading import check_images
from beit2.model.masked_image_model import MaskedImageModel
from beit2.training.frozen_scores import knn_top1, linear_top1
from beit2.training.run import Done, Run, due
from common import device as devices
from common import distributed
from common.errors import UsageError
from common.run.preemption import Interrupted
from common.run.progress import bar
from common.run_log import RunLog

MOST = 20_000  # pictures of a set that are looked at, evenly spread
_OPTION = "--monitor_data_path"


class Monitor:
    """Scores of the encoder on class folders: `train/` is what it is compared with, `val/` what is asked.

    Raises:
        UsageError: no such folders, or a picture that cannot be read.
    """

    def __init__(self, options: argparse.Namespace, normalizer: Normalizer, precision: str):
        self.options, self.normalizer, self.precision = options, normalizer, precision
        folder = _folder(options)
        paths, labels, names = find_classes(folder / "train", option=_OPTION)
        if len(names) < 2:
            raise UsageError(f"{_OPTION} {folder / 'train'}: a single class; at least two are needed")
        test_paths, truth, _ = find_classes(folder / "val", names, _OPTION)
        crop = CentreCrop(options.input_size)
        self.train, self.test = LabelledImages(paths, labels, crop), LabelledImages(test_paths, truth, crop)
        for pictures in (paths, test_paths):
            check_images(pictures)

    def is_due(self, run: Run, done: Done) -> bool:
        return done.run_ends or (done.epoch_ends and due(run.epoch + 1, self.options.monitor_every))

    def report(self, run: Run, log: RunLog, done: Done | None) -> dict[str, float]:
        """Scores the model and writes them to the log. All ranks call it.

        Args:
            done: the step that it comes after; None before the first, where the weights are those that were drawn.
        """
        # before the first step there is nothing to save: a signal then ends the run as it is
        stops = log.preempted if done is not None else lambda: False
        with run.evaluating(log, done, dict):
            results = self.scores(run.replica.model, stops)
        log.record(run.state.step, "monitor", **results)
        return results

    @torch.no_grad()
    def scores(self, model: MaskedImageModel, stops: Callable[[], bool]) -> dict[str, float]:
        """Top-1 in percent of the nearest neighbours, a linear classifier, and of guessing; the same on all ranks."""
        model.eval()
        (train, labels), (test, truth) = (
            self._features(model, pictures, stops) for pictures in (self.train, self.test)
        )
        results = {}
        if distributed.rank() == 0:
            guessing = 100 * float(truth.bincount().max()) / len(truth)
            sets = (train, labels, test, truth)
            results = {"knn_top1": knn_top1(*sets), "linear_top1": linear_top1(*sets), "guessing_top1": guessing}
        return {name: round(value, 3) for name, value in distributed.broadcast_object(results).items()}

    def _features(
        self, model: MaskedImageModel, pictures: LabelledImages, stops: Callable[[], bool]
    ) -> tuple[Tensor, Tensor]:
        """CLS and mean patch [pictures, 2 C] of all ranks, and classes int64 [pictures].

        Every rank does the same number of batches, as sharded models need: the last picture fills up.
        """
        rank, size, device = distributed.rank(), distributed.world_size(), self.normalizer.device
        chosen = range(0, len(pictures), -(-len(pictures) // MOST))
        share = [chosen[min(i, len(chosen) - 1)] for i in range(rank, -(-len(chosen) // size) * size, size)]
        workers = {"num_workers": self.options.num_workers, "generator": torch.Generator()}
        parts = []
        for batch, _ in bar(DataLoader(Subset(pictures, share), self.options.batch_size, **workers), "monitor"):
            if stops():
                raise Interrupted
            with devices.autocast(device, self.precision):
                states = model.encode(self.normalizer(self.normalizer.unit(batch))).float()  # [B, 1 + N, C]
            parts.append(torch.cat((states[:, 0], states[:, 1:].mean(dim=1)), dim=1).cpu())
        shares = distributed.gather_objects(torch.cat(parts))  # rank r has every size-th from the r-th on
        features = torch.stack(shares, dim=1).flatten(0, 1)[: len(chosen)]
        labels = torch.tensor([int(pictures.labels[index]) for index in chosen])
        return features.to(device), labels.to(device)


def _folder(options: argparse.Namespace) -> Path:
    """The folder that has train/ and val/."""
    folder = Path(options.monitor_data_path or options.data_path)
    if not options.monitor_data_path and folder.name == "train":
        folder = folder.parent
    if not ((folder / "train").is_dir() and (folder / "val").is_dir()):
        raise UsageError(
            f"--monitor_every {options.monitor_every}: {folder} has no train/ and val/ with class folders; name a "
            f"folder that has them by {_OPTION}"
        )
    return folder
