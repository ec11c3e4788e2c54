"""`--run_mode predict`: the best labels of every readable picture, the work shared over ranks and loader workers."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch.utils.data import DataLoader, Dataset

from common import device as devices
from common.data import pictures as picture_files
from common.distributed import World, gather_objects, process_group
from common.errors import UsageError
from common.run.result_file import keep_aside
from vit.api import prediction_grid
from vit.api.image_processor import URL_STARTS, ViTImageProcessor, load_image
from vit.api.predictor import ImageClassificationPipeline, Prediction, pipeline
from vit.config.description import config_of_run
from vit.config.run_config import Config
from vit.data.image_folder import BrokenImage
from vit.engine import local_checkpoint
from vit.model.vision_transformer import build
from vit.weights.labels import load_class_names
from vit.weights.loading import load_weights

RESULTS, UNREADABLE, GRID = "predictions.json", "unreadable.json", "predictions.png"
Answer = list[Prediction] | str  # labels, best first; or why there are none


def predict(config: Config, pictures: Sequence[str], batch_size: int, top_k: int) -> dict[str, list[Prediction]]:
    """Prints the best labels of pictures, or of all below folders, and writes them to `output_dir`.

    `predictions.json` has the labels by path, `predictions.png` a few pictures with their best three, `unreadable.json`
    the pictures that could not be read, if there are any, each with the reason.

    Raises:
        UsageError: no such picture, none in a folder, or none that can be read.
    """
    with process_group(config.device) as world:
        paths = find_pictures(pictures)
        weights = local_checkpoint(config.load_checkpoint, world)
        model = build(config_of_run(config, weights, training=False))
        load_weights(model, weights, head="required")
        names = load_class_names(weights)
        classify = pipeline(model=model, candidate_labels=names, device=world.device, precision=config.precision)
        begin = time.perf_counter()
        own = paths[world.rank :: world.size]
        answers = _answers(classify, own, batch_size, config.data.num_workers, top_k)
        devices.synchronize(world.device)
        everyones = {path: answer for part in gather_objects(answers) for path, answer in part.items()}
        seconds = time.perf_counter() - begin
        answers = {path: everyones[path] for path in paths}  # in the order they were asked for
        if all(isinstance(answer, str) for answer in answers.values()):
            raise UsageError(f"none of {len(paths)} pictures can be read: give others; the first: {answers[paths[0]]}")
        _report(config, world, answers, classify.labels, seconds)
        return {path: answer for path, answer in answers.items() if not isinstance(answer, str)}


def find_pictures(given: Sequence[str]) -> list[str]:
    """Named files and URLs as they are, of folders all pictures below; each once. UsageError where there is none."""
    found: list[str] = []
    for path in given:
        if path.startswith(URL_STARTS):
            found.append(path)
            continue
        path = Path(path)
        if not path.exists():
            raise UsageError(f"--predict_data {path}: no such file or folder")
        inside = list(picture_files.find(path)) if path.is_dir() else [str(path)]
        if not inside:
            raise UsageError(f"--predict_data {path}: no pictures in this folder")
        found += inside
    return list(dict.fromkeys(found))


class _Pictures(Dataset):
    """Model input of one picture, or why it cannot be read."""

    def __init__(self, paths: Sequence[str], processor: ViTImageProcessor):
        self.paths, self.processor = paths, processor

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[str, torch.Tensor | str]:
        path = self.paths[index]
        try:
            return path, self.processor(load_image(path))[0]  # [3, S, S]
        except BrokenImage as error:
            return path, str(error)


def _answers(
    classify: ImageClassificationPipeline, paths: Sequence[str], batch_size: int, workers: int, top_k: int
) -> dict[str, Answer]:
    loader = DataLoader(
        _Pictures(paths, classify.image_processor), batch_size=batch_size, num_workers=workers, collate_fn=list
    )
    answers: dict[str, Answer] = {}
    for batch in loader:
        readable = [(path, pixels) for path, pixels in batch if not isinstance(pixels, str)]
        answers |= {path: reason for path, reason in batch if isinstance(reason, str)}
        if readable:
            labels = classify.of_batch(torch.stack([pixels for _, pixels in readable]), top_k)
            answers |= {path: row for (path, _), row in zip(readable, labels, strict=True)}
    return answers


def shown(path: str) -> str:
    r"""A path as valid text: bytes of a file's name that are no UTF-8 become \xff."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def _report(config: Config, world: World, answers: dict[str, Answer], classes: Sequence[str], seconds: float) -> None:
    if not world.is_main:
        return
    labels = {path: answer for path, answer in answers.items() if not isinstance(answer, str)}
    unreadable = {shown(path): shown(answer) for path, answer in answers.items() if isinstance(answer, str)}
    for path, entries in labels.items():
        print(f"{shown(path)}: " + ", ".join(f"{entry['label']} {entry['score']:.4f}" for entry in entries))
    for reason in unreadable.values():
        print(f"warning: {reason}", file=sys.stderr)
    print(f"{len(labels)} pictures and {len(unreadable)} unreadable: {seconds:.2f} s, {len(labels) / seconds:.2f} FPS")
    folder = Path(config.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    keep_aside(folder, [RESULTS, UNREADABLE, GRID])
    _write_json(folder / RESULTS, {shown(path): entries for path, entries in labels.items()})
    if unreadable:
        _write_json(folder / UNREADABLE, unreadable)
    print(f"written to {folder / RESULTS}")
    if any(labels.values()):  # none with --top_k 0
        prediction_grid.draw(labels, classes, folder / GRID)
        print(f"the first {min(len(labels), prediction_grid.MOST)} are drawn in {folder / GRID}")


def _write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
